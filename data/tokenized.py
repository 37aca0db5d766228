"""Prompts as tokens: made once, found again by their fingerprint, read from a memory-mapped HF dataset."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self

import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .interactions import Catalog
from .prompt_rows import PromptSettings
from .prompt_tokens import PromptEncoder
from .prompts import template_by_name, title_texts
from .splits import Phase, Split

LAYOUT_VERSION = 1  # raise it whenever the same settings would give other rows
ROWS_PER_BATCH = 2048  # rows joined and written together: some tens of megabytes
SHOW_AFTER = 1.0  # seconds: shorter builds show no progress bar
BUILD_SECONDS = 3600  # how long a job waits for another one that builds the same prompts


@dataclass(frozen=True)
class Prompts:
    """What one tokenizer makes of one catalogue's histories; the rows of a phase are built when first asked for."""

    catalog: Catalog
    tokenizer: PreTrainedTokenizerFast
    settings: PromptSettings
    cache: Path
    main_process: bool = True

    def rows(self, split: Split, phase: Phase | Literal["train"]) -> Dataset:
        """Return the rows of a phase, see `build_prompts`; those of no data set (no hash) are not kept on disk."""
        if split.hash:
            arguments = (self.catalog, self.tokenizer, self.settings, phase, self.cache, self.main_process)
            return build_prompts(split, *arguments)
        in_memory = pa.BufferOutputStream()
        _write(PromptEncoder(split, self.catalog, self.tokenizer, self.settings), phase, in_memory, progress=False)
        return Dataset.from_buffer(in_memory.getvalue())


def build_prompts(
    split: Split,
    catalog: Catalog,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings,
    phase: Phase | Literal["train"],
    cache: Path,
    main_process: bool = True,
) -> Dataset:
    """The rows of one phase as a memory-mapped dataset, built only if `cache` does not hold them yet.

    Columns: input_ids (list of int32), context (int32: leading tokens that are no labels), user, position
    (int32: of the first label in the user's sequence), length (int32). Rows of validation and test have no
    labels, but a column row (int32: index into `split.targets(phase)`). Many jobs may call this at once: one
    of them builds. Raises ValueError when there are no rows, or when `settings.max_length` cannot hold the
    prompt and one title.
    """
    folder = cache / "prompts" / fingerprint(split, catalog, tokenizer, settings, phase)
    if not _is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=BUILD_SECONDS):
            if not _is_whole(folder):  # nobody else built it while this job waited
                _build(split, catalog, tokenizer, settings, phase, folder, main_process)
    return Dataset.from_file(str(folder / "prompts.arrow"))


def shared_start(prompts: Dataset) -> int:
    """Return how many tokens all training rows begin with, up to where the first label of any stands."""
    shared = int(prompts.data.column("context").to_numpy().min()) - 1
    first = np.array(prompts[0]["input_ids"])
    for chunk in prompts.data.column("input_ids").chunks:
        starts = chunk.offsets.to_numpy()[:-1, None]
        alike = (chunk.values.to_numpy()[starts + np.arange(shared)] == first[:shared]).all(axis=0)
        shared = int(np.append(alike, False).argmin())
    return shared


def fingerprint(
    split: Split,
    catalog: Catalog,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings,
    phase: Phase | Literal["train"],
) -> str:
    """A name for everything that the rows depend on: same name, same rows."""
    backend = tokenizer.backend_tokenizer.to_str()
    # In front of it are the options for truncation and padding, which any call may leave changed.
    backend = backend[backend.index('"added_tokens"') :]
    described = {
        "layout": LAYOUT_VERSION,
        "phase": phase,
        "split": [split.name, split.hash],
        "settings": asdict(settings),
        "template": asdict(template_by_name(settings.template)),
        "titles": title_texts(catalog),
        "tokenizer": [backend, tokenizer.bos_token_id, tokenizer.eos_token_id],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    arrays = [split.items, split.offsets, split.train_end]
    arrays += [] if phase == "train" else [split.targets(phase).user, split.targets(phase).position]
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.int64).data)
    return digest.hexdigest()[:32]


def _is_whole(folder: Path) -> bool:
    """Whether the rows are there in their full length."""
    built, prompts = folder / "build.json", folder / "prompts.arrow"
    return built.is_file() and prompts.is_file() and json.loads(built.read_text())["bytes"] == prompts.stat().st_size


def _build(
    split: Split,
    catalog: Catalog,
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings,
    phase: Phase | Literal["train"],
    folder: Path,
    main_process: bool,
) -> None:
    """Write everything beside `folder`, then give it its name: whoever finds the name finds the whole."""
    began = time.perf_counter()
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    for leftover in (unfinished, folder):  # of a build that was killed, or damaged later
        shutil.rmtree(leftover, ignore_errors=True)
    encoder = PromptEncoder(split, catalog, tokenizer, settings)
    unfinished.mkdir()
    try:
        path = unfinished / "prompts.arrow"
        with open(path, "wb") as file:
            shortened = _write(encoder, phase, file, main_process)
            file.flush()
            os.fsync(file.fileno())  # on disk before the folder gets its name
        built = {
            "bytes": path.stat().st_size,
            "shortened_rows": shortened,
            "seconds": time.perf_counter() - began,
        }
        (unfinished / "build.json").write_text(json.dumps(built))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk is not made fuller


def _write(
    encoder: PromptEncoder, phase: Phase | Literal["train"], sink: BinaryIO | pa.BufferOutputStream, progress: bool
) -> int:
    """Write all rows of a phase as one Arrow stream, batch by batch; returns how many of them lost titles.

    One process does it: joining is bound by memory, and a second one only made it slower.
    """
    rows, shortened = encoder.rows(phase)
    names = ["context", "user", "position", "length"] + (["row"] if phase != "train" else [])
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), *((name, pa.int32()) for name in names)])
    starts = range(0, rows.total, ROWS_PER_BATCH)
    with pa.ipc.new_stream(sink, schema) as writer:
        for start in tqdm(starts, f"{phase} prompts", unit="batch", disable=not progress, delay=SHOW_AFTER):
            batch = rows.take(slice(start, start + ROWS_PER_BATCH))
            tokens, context, lost = encoder.encode(batch)
            row = start + np.arange(len(tokens))
            columns = [context, batch.user, batch.position, tokens.lengths, row][: len(names)]
            ids = pa.ListArray.from_arrays(tokens.offsets.astype(np.int32), tokens.ids)
            arrays = [ids, *(column.astype(np.int32) for column in columns)]
            writer.write(pa.record_batch(arrays, schema=schema))
            shortened += int(lost.sum())
    return shortened


@dataclass(frozen=True)
class PromptReport:
    """What a build of prompts cost, and what its batches will waste."""

    rows: int
    tokens: int
    label_tokens: int
    padding_share: float
    """Share of the batches that is padding, when rows of similar length are batched together."""
    shortened_rows: int
    """Rows that lost their oldest titles to `max_length`."""
    bytes_on_disk: int
    seconds: float
    """Of the build, not of this call."""

    @classmethod
    def of(cls, prompts: Dataset, batch_size: int) -> Self:
        """Report on a dataset that `build_prompts` returned."""
        path = Path(prompts.cache_files[0]["filename"])
        built = json.loads(path.with_name("build.json").read_text())
        lengths = np.sort(prompts.data.column("length").to_numpy()).astype(np.int64)
        context = prompts.data.column("context").to_numpy()
        starts = np.arange(0, len(lengths), batch_size)
        batch_sizes = np.diff(np.append(starts, len(lengths)))
        padded = (np.maximum.reduceat(lengths, starts) * batch_sizes).sum()
        return cls(
            rows=len(lengths),
            tokens=int(lengths.sum()),
            label_tokens=int(lengths.sum() - context.sum(dtype=np.int64)),
            padding_share=float(1 - lengths.sum() / padded),
            shortened_rows=built["shortened_rows"],
            bytes_on_disk=built["bytes"],
            seconds=built["seconds"],
        )
