"""A finished run, loaded back from its folder without its training data."""

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.cold_items import with_cold_items
from data.config import DataConfig
from data.interactions import Catalog
from data.sources import read
from data.splits import Split, Targets, split
from trainers.state import load_weights

from .config import RunConfig, parse
from .methods import METHODS, Built, Setting
from .run_folder import RunFolder, read_catalog
from .setting import HISTORIES


@dataclass(frozen=True)
class LoadedRun:
    """What model/ holds, ready to score."""

    folder: RunFolder
    config: RunConfig
    catalog: Catalog
    built: Built

    @property
    def checksum(self) -> str:
        """Of its weights."""
        with open(self.folder.model / "model.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def load_run(path: Path, *, full_precision: bool = False) -> LoadedRun:
    """Load the model of a run; exit with the reason when there is none.

    `full_precision` loads the backbone's frozen weights in float32, however the run stored them.
    """
    folder = RunFolder(path)
    if not (folder.model / "model.safetensors").is_file():
        sys.exit(f"error: --run {path} {_why_not(folder)}. Trained runs: {', '.join(_trained_runs(path)) or 'none'}")
    config = parse(["--config", str(folder.model / "config.json")])
    if full_precision and config.backbone is not None:
        config.backbone = replace(config.backbone, quantization="none", dtype="float32")
    catalog = read_catalog(folder.model / "catalog.json")
    setting = setting_of(config, histories_as_split([np.array([1])], catalog), catalog, saved=folder.model)
    try:
        built = METHODS[config.model].build(setting)
    except ValueError as error:  # a run or a backbone that it names is no longer there
        sys.exit(f"error: {error}")
    load_weights(built.model, folder.model / "model.safetensors")
    built.model.eval()
    return LoadedRun(folder, config, catalog, built)


def setting_of(
    config: RunConfig, split: Split, catalog: Catalog, *, is_main: bool = True, saved: Path | None = None
) -> Setting:
    """What a run's method is built from; `saved` is the model folder where the run has ended."""
    return Setting(
        split=split,
        catalog=catalog,
        method=config.method,
        backbone=config.backbone,
        seed=config.train.seed,
        cache=config.data.cache_folder,
        load_model=load_model,
        is_main=is_main,
        saved=saved,
    )


def load_model(path: Path) -> Built:
    """Return the model of an earlier run with its examples: what a later stage builds on."""
    return load_run(path).built


def read_and_split(config: DataConfig) -> tuple[Catalog, Split]:
    """Read and split a data set; exit with the reason where that cannot be done.

    What only splitting needs, such as the times of events, is not kept: half of the memory.
    """
    try:
        interactions = read(config)
        parts = split(interactions, config)
        if config.cold_items:
            parts = with_cold_items(parts, interactions.catalog, config.cold_items, config.cold_seed)
        return interactions.catalog, parts
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def read_data_of(run: LoadedRun) -> Split:
    """Return the split of a run's data set; exit when its items are no longer the ones that the run learned."""
    catalog, parts = read_and_split(run.config.data)
    if catalog.raw_ids != run.catalog.raw_ids:
        sys.exit(
            f"error: --run {run.folder.path} learned {run.catalog.num_items:,} items, and {run.config.data.source} now "
            f"has {catalog.num_items:,} or others: bring its data back, or train anew"
        )
    return parts


def _why_not(folder: RunFolder) -> str:
    if not folder.path.is_dir():
        return "does not exist"
    if folder.config_file.is_file():
        return f"is not finished: launch/train.py --config {folder.config_file} --output {folder.path} goes on with it"
    return "is not a run folder"


def _trained_runs(near: Path) -> list[str]:
    folders = (near, near.parent, Path("runs"))
    return sorted({str(file.parents[1]) for folder in folders for file in folder.glob("*/model/model.safetensors")})


def histories_as_split(histories: list[np.ndarray], catalog: Catalog) -> Split:
    """Return a split whose test histories are the given ones, each followed by a target that nobody looks at."""
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    items = np.concatenate([np.append(history, 1) for history in histories]).astype(np.int64)
    cases = Targets(np.arange(len(histories), dtype=np.int64), lengths)
    return Split(
        name=HISTORIES,
        kind="leave-one-out",
        offsets=np.concatenate([[0], np.cumsum(lengths + 1)]),
        items=items,
        train_end=lengths,
        valid=cases,
        test=cases,
        num_items=catalog.num_items,
        hash="",
        raw_users=tuple(map(str, range(len(histories)))),
    )
