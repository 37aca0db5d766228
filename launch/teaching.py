"""Lists and item vectors of any run that ranks the catalogue, written into a folder for students (launch/label.py)."""

import sys
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list

from data.candidate_store import training_cuts
from data.splits import Split
from data.teacher_lists import Manifest, TeacherFolder
from evaluation.run_folders import load_run as read_run
from trainers.runtime import Runtime

from .candidates import best_of, checksum_of
from .earlier_runs import Asking
from .loading import LoadedRun
from .setting import CannotRank

WINDOWS_ANSWER = 16  # times as many lists go to a file where one pass answers a whole window: it takes seconds then


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
    manifest = folder.described(run.config.model, run.folder.path.name, checksum_of(run.folder.path)[:16], k, cuts)
    rows = told_by_main(folder, manifest, runtime)
    model = run.built.model.to(runtime.device).requires_grad_(False).eval()
    asking, total, watchdog = Asking.like([read_run(run.folder.path)]), len(rows), runtime.watchdog
    at_once *= 1 if run.built.every_position is None else WINDOWS_ANSWER
    for start in range(0, total, at_once):
        watchdog.arrive(f"list {start}")
        some = rows[start : start + at_once]
        store = best_of(run.built, asking, parts, "train", k, some, watchdog.each).require_full("--k")
        runtime.on_main(lambda some=some, store=store: folder.add(manifest, some, store))  # type: ignore[misc]
        if runtime.is_main:
            written = start + len(some)
            print(f"\r{written:,} of {total:,} lists", end="\n" if written == total else "", flush=True)
    vectors = model.catalogue_vectors()
    runtime.on_main(lambda: folder.finish(manifest, vectors))
    if runtime.is_main:
        width = "no item vectors" if vectors is None else f"item vectors of {vectors.shape[1]} numbers"
        print(f"{folder.manifest.rows:,} lists of {k} and {width} in {output}")


def told_by_main(folder: TeacherFolder, manifest: Manifest, runtime: Runtime) -> np.ndarray:
    """The rows of `training_cuts` that have no list yet, as the main process finds them in its folder. Collective."""
    told: list[np.ndarray | str | None] = [None]
    if runtime.is_main:
        try:
            folder.require(manifest)
            told = [missing_rows(folder, manifest.cuts)]
        except ValueError as error:
            told = [str(error)]
    (found,) = broadcast_object_list(told)
    if isinstance(found, str):
        raise ValueError(found)
    assert found is not None
    return found


def missing_rows(folder: TeacherFolder, last: int | None) -> np.ndarray:
    """The rows of `training_cuts` that are asked for and have no list yet, which ascend."""
    cuts = training_cuts(folder.split)
    asked = np.ones(len(cuts), dtype=bool)
    if last is not None:
        asked = folder.split.train_end[cuts.user] - cuts.position <= last
    asked[folder.rows()] = False
    return np.flatnonzero(asked)
