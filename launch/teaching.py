"""Lists and item vectors of any run that ranks the catalogue, written into a folder for students (launch/label.py)."""

import sys
from pathlib import Path

import numpy as np

from data.candidate_store import training_cuts
from data.splits import Split
from data.teacher_lists import Manifest, TeacherFolder
from evaluation.run_folders import load_run as read_run
from trainers.runtime import Runtime

from .candidates import best_of
from .earlier_runs import Asking
from .loading import LoadedRun
from .setting import CannotRank


def write_lists(
    run: LoadedRun, parts: Split, runtime: Runtime, output: Path, k: int, cuts: int | None, at_once: int
) -> None:
    """Write the best k items of each training history, or of each user's last `cuts`, then the item vectors.

    Lists that are there already are not asked for again; `at_once` of them go to a file. Collective.
    Raises ValueError where the folder holds something else, or the run names fewer items.
    """
    try:
        run.built.require_full_ranking()
    except CannotRank as error:
        sys.exit(f"error: --run {run.folder.path}: {error}")
    folder = TeacherFolder(output, parts, run.catalog)
    items, name = Manifest.checksum(run.catalog), run.folder.path.name
    manifest = Manifest(parts.hash, items, run.config.model, name, run.checksum, k, cuts)
    folder.require(manifest)
    rows = missing_rows(folder, parts, cuts)
    runtime.wait()  # everybody has read what the main process now adds to
    if runtime.is_main:
        folder.begin(manifest)
    model = run.built.model.to(runtime.device).requires_grad_(False).eval()
    asking, total = Asking.like([read_run(run.folder.path)]), len(rows)
    for start in range(0, total, at_once):
        some = rows[start : start + at_once]
        store = best_of(run.built, asking, parts, "train", k, some).require_full("--k")
        if runtime.is_main:
            folder.add(some, store)
            written = start + len(some)
            print(f"\r{written:,} of {total:,} lists", end="\n" if written == total else "", flush=True)
    vectors = model.catalogue_vectors()
    if runtime.is_main:
        folder.finish(vectors)
        width = "no item vectors" if vectors is None else f"item vectors of {vectors.shape[1]} numbers"
        print(f"{folder.manifest.rows:,} lists of {k} and {width} in {output}")


def missing_rows(folder: TeacherFolder, parts: Split, last: int | None) -> np.ndarray:
    """The rows of `training_cuts` that are asked for and have no list yet, which ascend."""
    cuts = training_cuts(parts)
    asked = np.ones(len(cuts), dtype=bool)
    if last is not None:
        asked = parts.train_end[cuts.user] - cuts.position <= last
    asked[folder.rows()] = False
    return np.flatnonzero(asked)
