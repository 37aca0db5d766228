"""What a teacher names for training histories, in a folder that outlives it and that students learn from.

teacher.json        of what all this is made; how many lists there are, once they are all there
lists/*.parquet     user and cut (how many events the history has), and of the best k items, best first: raw ids, scores
                    (higher is better) and confidence, the softmax of the scores over the list
items.safetensors   item_vectors [N + 1, D], row 0 zero, where the teacher has any
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .candidate_store import CandidateStore, cut_rows, training_cuts
from .interactions import Catalog
from .splits import Split
from .teacher_labels import require_training_events

MANIFEST = "teacher.json"
VECTORS = "item_vectors"


@dataclass(frozen=True)
class Manifest:
    """Of what a folder is made."""

    split: str  # its hash
    events: str  # the checksum of catalogue, sequences and training parts: of what `cut` and items mean
    model: str
    run: str
    weights: str  # the checksum of weights and settings
    k: int
    cuts: int | None  # the last so many events of each user; None for all
    rows: int | None = None  # None until all lists are there


@dataclass(frozen=True)
class TeacherFolder:
    """The folder, seen from one split and catalogue."""

    path: Path
    split: Split
    catalog: Catalog

    def described(self, model: str, run: str, weights: str, k: int, cuts: int | None) -> Manifest:
        """What a folder of this split says of a teacher."""
        return Manifest(self.split.hash, self._checksum(), model, run, weights, k, cuts)

    def _checksum(self) -> str:
        digest = hashlib.sha256(json.dumps(self.catalog.raw_ids).encode())
        for array in (self.split.items, self.split.offsets, self.split.train_end):
            digest.update(array.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    @property
    def manifest(self) -> Manifest:
        """Raises ValueError where there is none."""
        try:
            return Manifest(**json.loads((self.path / MANIFEST).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.path / MANIFEST} cannot be read ({error})") from error

    def require(self, manifest: Manifest) -> None:
        """Raise ValueError where the folder is made of something else, or is none."""
        if self.path.is_file() or (self.path / "config.yaml").exists():
            raise ValueError(f"--output {self.path} is a file or a run: name a folder for the lists, or FILE.jsonl")
        if (self.path / MANIFEST).exists() and (there := replace(self.manifest, rows=None)) != manifest:
            raise ValueError(
                f"--output {self.path} holds lists of {there}, and these would be of {manifest}: name another folder"
            )

    def add(self, manifest: Manifest, rows: np.ndarray, store: CandidateStore) -> None:
        """Add the lists of some rows of `training_cuts` [n], all or nothing; the first ones make the folder."""
        (self.path / "lists").mkdir(parents=True, exist_ok=True)
        self._describe(manifest)
        cuts = training_cuts(self.split)
        user, cut = cuts.user[rows], cuts.position[rows]
        require_training_events(self.split, user, cut)
        raw_ids = pa.array(self.catalog.raw_ids, pa.string())
        items = pa.DictionaryArray.from_arrays(store.items.ravel(), raw_ids).cast(pa.string())
        confidence = torch.from_numpy(store.scores).softmax(1).numpy()
        columns = {
            "user": pa.array([self.split.raw_users[u] for u in user], pa.string()),
            "cut": pa.array(cut, pa.int32()),
            "items": pa.FixedSizeListArray.from_arrays(items, store.k),
            "scores": pa.FixedSizeListArray.from_arrays(pa.array(store.scores.ravel(), pa.float32()), store.k),
            "confidence": pa.FixedSizeListArray.from_arrays(pa.array(confidence.ravel(), pa.float32()), store.k),
        }
        path = self.path / "lists" / f"{rows[0]:09d}-{rows[-1]:09d}.parquet"
        whole(path, lambda file: parquet.write_table(pa.table(columns), file))

    def finish(self, manifest: Manifest, vectors_ND: Tensor | None) -> None:
        """Add the item vectors, and say that everything is there."""
        if vectors_ND is not None:
            vectors = vectors_ND.detach().float().cpu().clone()
            vectors[0] = 0
            whole(self.path / "items.safetensors", lambda file: save_file({VECTORS: vectors}, file))
        self._describe(replace(manifest, rows=len(self.rows())))

    def rows(self) -> np.ndarray:
        """The rows of `training_cuts` that have a list, in the order of the files, [n]."""
        found = [np.empty(0, np.int64)]
        for file in self._files():
            table = parquet.read_table(file, columns=["user", "cut"])
            user = numbers(table["user"], self.split.raw_users, f"{file}: users of another data set")
            cut = table["cut"].to_numpy().astype(np.int64)
            require_training_events(self.split, user, cut)
            found.append(cut_rows(self.split, user, cut))
        return np.concatenate(found)

    def require_lists(self, k: int) -> None:
        """Raise ValueError where there are no k items for this split's histories, or not all of them are there yet."""
        manifest = self.manifest
        there, here = (manifest.split, manifest.events), (self.split.hash, self._checksum())
        if there != here:
            raise ValueError(
                f"--method.teacher {self.path} has lists of split {there[0][:12]}, events {there[1][:12]}, and "
                f"--data.* gives split {here[0][:12]}, events {here[1][:12]}: both need the same data and split"
            )
        if manifest.rows is None:
            raise ValueError(f"--method.teacher {self.path} is not finished: the same launch/label.py goes on with it")
        if k > manifest.k:
            raise ValueError(
                f"--method.teacher {self.path} names {manifest.k} items a history: lower --method.teacher_k {k}"
            )

    def read(self, k: int) -> tuple[np.ndarray, CandidateStore]:
        """The rows of `training_cuts` that have a list, [n], and the best k of each.

        Raises ValueError where there are none such.
        """
        self.require_lists(k)
        rows, manifest = self.rows(), self.manifest
        if len(rows) != manifest.rows:
            raise ValueError(
                f"--method.teacher {self.path} has {len(rows):,} lists of {manifest.rows:,}: bring the missing "
                "files of lists/ back"
            )
        items, scores = [np.empty((0, k), np.int32)], [np.empty((0, k), np.float32)]
        for file in self._files():
            table = parquet.read_table(file, columns=["items", "scores"])
            names, said = (table[name].combine_chunks().flatten() for name in ("items", "scores"))
            listed = numbers(names, self.catalog.raw_ids, f"{file}: items of another catalogue").astype(np.int32)
            items.append(listed.reshape(-1, manifest.k)[:, :k])
            scores.append(said.to_numpy().astype(np.float32).reshape(-1, manifest.k)[:, :k])
        return rows, CandidateStore(np.concatenate(items), np.concatenate(scores))

    def vectors(self) -> Tensor | None:
        """The item vectors [N + 1, D], where there are some."""
        file = self.path / "items.safetensors"
        return load_file(file)[VECTORS] if file.is_file() else None

    def _files(self) -> list[Path]:
        return sorted((self.path / "lists").glob("*.parquet"))

    def _describe(self, manifest: Manifest) -> None:
        text = json.dumps(asdict(manifest), indent=1)
        whole(self.path / MANIFEST, lambda file: file.write_text(text))


def numbers(values: pa.Array | pa.ChunkedArray, names: tuple[str, ...], otherwise: str) -> np.ndarray:
    """The place of each value among names, int64; raises ValueError, saying what else it is, where one is not there."""
    found = pc.index_in(values, value_set=pa.array(names, pa.string()))
    if found.null_count:
        raise ValueError(f"{otherwise} ({found.null_count} unknown)")
    return np.asarray(found).astype(np.int64)


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file have its name only when all of it is on disk."""
    unfinished = path.with_suffix(".unfinished")
    write(unfinished)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
