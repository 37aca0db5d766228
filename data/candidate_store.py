"""What a retriever found for each history: its top k with their scores, in one small file."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self
from zipfile import BadZipFile

import numpy as np
import torch

from .batches import Examples
from .splits import Phase, Split, Targets
from .title_tokens import ends_of, ranges

# The rows of a store: the targets of a phase, or every training event that has one before it (`training_cuts`).
StoredPhase = Literal["train"] | Phase


@dataclass(frozen=True)
class CandidateStore:
    """The k best items for each row, best first, none of them met before; 8 bytes a candidate.

    Where a retriever names fewer than k items, the rest is item 0 with the score -inf.
    """

    items: np.ndarray  # [n, k] int32
    scores: np.ndarray  # [n, k] float32

    @property
    def k(self) -> int:
        return self.items.shape[1]

    def places(self, targets: np.ndarray) -> np.ndarray:
        """Where each row's target [n] stands among its candidates, from 0; -1 where it is not one of them."""
        hit = self.items == targets[:, None]
        return np.where(hit.any(axis=1), hit.argmax(axis=1), -1)

    def recall(self, targets: np.ndarray) -> float:
        """Share of targets [n] among their candidates: what no ranking of them can exceed."""
        return float((self.places(targets) >= 0).mean())

    def require_full(self, flag: str) -> Self:
        """Return the store; raise ValueError where a row has fewer than k candidates."""
        counts = (self.items > 0).sum(axis=1)
        if counts.size and counts.min() < self.k:
            raise ValueError(
                f"the retriever names only {counts.min()} items for some users, and {flag} {self.k} asks for more: "
                "lower it"
            )
        return self

    def save(self, path: Path) -> None:
        """Write beside `path` and give it its name last: whoever finds the name finds the whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        try:
            with open(unfinished, "wb") as file:
                np.savez(file, items=self.items, scores=self.scores)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, num_rows: int, k: int) -> Self:
        """Read what `save` wrote; raises ValueError where it is damaged or of another size than [num_rows, k]."""
        try:
            with np.load(path, allow_pickle=False) as file:
                store = cls(file["items"], file["scores"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error})") from error
        for array in (store.items, store.scores):
            if array.shape != (num_rows, k):
                raise ValueError(f"{path} holds {array.shape} candidates, expected {(num_rows, k)}")
        return store


def store_name(split: Split, phase: StoredPhase, k: int, retriever: str) -> str:
    """A name for all that the candidates depend on; `retriever` is its checksum."""
    windows = "overlapping " if phase == "train" else ""
    digest = hashlib.sha256(f"{retriever} {split.hash} {phase} {k} {windows}".encode())
    rows = rows_of(split, phase)
    for array in (split.items, split.offsets, rows.user, rows.position):
        digest.update(array.astype(np.int64).tobytes())
    return f"{digest.hexdigest()[:32]}.npz"


def rows_of(split: Split, phase: StoredPhase) -> Targets:
    """The user and position of each row of a store."""
    return training_cuts(split) if phase == "train" else split.targets(phase)


def training_cuts(split: Split) -> Targets:
    """Every training event that has one before it, by user and position: its history ends where training may look."""
    counts = np.maximum(split.train_end - 1, 0)
    return Targets(np.repeat(np.arange(split.num_users), counts), ranges(np.ones_like(counts), counts))


def cut_rows(split: Split, user: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The rows of `training_cuts` that ask for these events, [n]."""
    return ends_of(np.maximum(split.train_end - 1, 0))[user] + position - 1


def as_test(split: Split, rows: Targets) -> Split:
    """A split whose test targets are these events, to ask any method about histories that end in front of them.

    It has no hash: nothing that is made of it is kept on disk.
    """
    return replace(split, valid=rows, test=rows, hash="")


def overlapping_spans(split: Split, window: int) -> np.ndarray:
    """Windows (user, start, first, end) of at most `window` inputs start..end-1, of which first..end-1 answer, [n, 4].

    Every row of `training_cuts` is answered once, from half a window at least of what came before it, or all of it.
    """
    step = max(1, window // 2)
    spans = []
    for user, last in enumerate((split.train_end - 1).tolist()):
        first = 0
        while first < last:
            end = min(last, max(window, first + step))
            spans.append((user, max(0, end - window), first, end))
            first = end
    return np.array(spans, dtype=np.int64).reshape(-1, 4)


class TrainingWindows:
    """Histories before training events, for models that answer at every position of a window in one pass.

    `examples_of` gives examples of spans (user, start, end) whose labelled slots are their inputs, in order. Only
    windows that answer one of `rows` are there.
    """

    def __init__(
        self, split: Split, window: int, examples_of: Callable[[Split, np.ndarray], Examples], rows: np.ndarray
    ) -> None:
        self.split, spans = split, overlapping_spans(split, window)
        user, _, first, end = spans.T
        asked = np.zeros(len(training_cuts(split)) + 1, dtype=np.int64)
        asked[rows + 1] = 1
        asked = asked.cumsum()
        answers = asked[cut_rows(split, user, end) + 1] > asked[cut_rows(split, user, first + 1)]
        self.spans = spans[answers]
        self.examples = examples_of(split, self.spans[:, [0, 1, 3]])
        self.lengths = self.examples.lengths

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> Any:
        """Return the batch of some windows, labelled where they answer."""
        batch: Any = self.examples.collate(indices, epoch, progress)
        _, start, first, end = self.spans[indices].T
        answering = torch.from_numpy(ranges(ends_of(end - start)[:-1] + first - start, end - first))
        row = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return replace(batch, labelled=batch.labelled[answering], targets=batch.targets[answering], row=row)

    def cuts(self, indices: np.ndarray) -> np.ndarray:
        """The row of `training_cuts` that each labelled slot of a batch of these windows answers, [T]."""
        user, _, first, end = self.spans[indices].T
        return cut_rows(self.split, np.repeat(user, end - first), ranges(first + 1, end - first))
