"""Find the data that `--data.source` names, and read it with the reader of its format."""

import difflib
import importlib.util
import os
import re
from pathlib import Path

import pyarrow as pa

from . import movielens, sequences, tables
from .bad_rows import BadRowLog
from .config import DataConfig
from .download import ARCHIVES, DownloadError, download
from .interactions import Interactions, RawEvents, build_interactions
from .sample import read_sample

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_SUFFIXES = (".csv", ".tsv", ".parquet", ".inter", ".txt", ".dat", ".data")


def read(config: DataConfig) -> Interactions:
    """Read, validate, filter and number the events of `config.source`.

    Raises BadRows for malformed rows, FileNotFoundError when there is no such source, and ValueError when its
    format is unknown or no event passes the filters.
    """
    bad_rows = BadRowLog(config.on_bad_rows)
    name = config.source
    if name == "sample":
        events = read_sample(config.sample_users, config.sample_series, config.sample_seed)
    elif path := find(config):
        if name not in ARCHIVES:
            name = path.resolve().name if path.is_dir() else path.stem
        events = read_path(path, config, bad_rows)
    else:
        events = _read_from_hub(config, bad_rows)
    bad_rows.close()
    pa.default_memory_pool().release_unused()  # what parsing took: as much again as the events
    return build_interactions(name, events, config)


def data_root(config: DataConfig) -> Path:
    """Where datasets lie by name: `--data.root`, else $SHARDREC_DATA, else ~/.cache/shardrec."""
    return config.root or Path(os.environ.get("SHARDREC_DATA") or Path.home() / ".cache" / "shardrec")


def find(config: DataConfig) -> Path | None:
    """The file or folder that `config.source` means, downloaded if need be; None for a dataset of the hub.

    Raises FileNotFoundError, with the closest known names or with the remedies.
    """
    source, root = config.source, data_root(config)
    if (root / source).exists():
        return root / source
    if source in ARCHIVES:
        return _obtain(source, root)
    if Path(source).exists():
        return Path(source)
    if _HUB_ID.fullmatch(source) and not source.endswith(_FILE_SUFFIXES):
        return None
    known = {"sample", *ARCHIVES} | {folder.name for folder in root.glob("[!.]*/")}
    names = ", ".join(difflib.get_close_matches(source, sorted(known), n=3, cutoff=0.4) or sorted(known))
    raise FileNotFoundError(
        f"--data.source {source}: no such file or folder, nor one in the data root {root}. Closest: {names}."
    )


def _obtain(name: str, root: Path) -> Path:
    try:
        return download(name, root)
    except DownloadError as error:
        packaged = _recbole_ml_100k() if name == "ml-100k" else None
        if packaged:
            return packaged
        package = ", install the package recbole, which carries these ratings" if name == "ml-100k" else ""
        raise FileNotFoundError(
            f"{name} is not in the data root {root}, and downloading it failed: {error}\n"
            "Put its unpacked folder there (or name another root with --data.root or $SHARDREC_DATA), "
            f"connect to the network{package}, or use --data.source sample, which needs neither."
        ) from error


def _recbole_ml_100k() -> Path | None:
    """The ratings inside an installed `recbole`, found without importing it: its imports are heavy."""
    spec = importlib.util.find_spec("recbole")
    for package in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(package) / "dataset_example" / "ml-100k"
        if folder.is_dir():
            return folder
    return None


def _read_from_hub(config: DataConfig, bad_rows: BadRowLog) -> RawEvents:
    try:
        return tables.read_huggingface(config.source, config.columns, bad_rows)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"--data.source {config.source}: no such path, and as a dataset of the Hugging Face hub it "
            f"cannot be loaded: {error}"
        ) from error


def read_path(path: Path, config: DataConfig, bad_rows: BadRowLog) -> RawEvents:
    """Read a file or folder by what it looks like. Raises ValueError when it looks like nothing known."""
    columns = config.columns
    if path.is_dir():
        return _read_folder(path, config, bad_rows)
    if path.suffix == ".inter":
        return tables.read_atomic(path, columns, bad_rows)
    if path.suffix in (".csv", ".tsv"):
        return tables.read_csv(path, columns, bad_rows)
    if path.suffix == ".parquet":
        return tables.read_parquet(path, columns, bad_rows)
    if path.suffix == ".txt":
        return sequences.read_sequences(path, bad_rows)
    if path.name in ("u.data", "ratings.dat"):
        return _read_folder(path.parent, config, bad_rows)
    raise ValueError(f"{path}: unknown suffix; expected one of {', '.join(_FILE_SUFFIXES)}.")


def _read_folder(folder: Path, config: DataConfig, bad_rows: BadRowLog) -> RawEvents:
    columns = config.columns
    names = {path.name for path in folder.iterdir()}
    if "u.data" in names:
        return movielens.read_u_data(folder, bad_rows)
    if "ratings.dat" in names:
        return movielens.read_dat(folder, bad_rows)
    if "ratings.csv" in names:
        return movielens.read_csv(folder, columns, bad_rows)
    if {"id2name.txt", "train.jsonl", "valid.jsonl", "test.jsonl"} <= names:
        return sequences.read_llara_rows(folder, bad_rows)
    if "sequences.txt" in names:
        return sequences.read_sequences(folder / "sequences.txt", bad_rows)
    if names & {"dataset_info.json", "dataset_dict.json"}:
        return tables.read_huggingface(str(folder), columns, bad_rows)
    if atomic := sorted(folder.glob("*.inter")):
        return tables.read_atomic(atomic[0], columns, bad_rows)
    if any(folder.glob("*.parquet")):
        return tables.read_parquet(folder, columns, bad_rows)
    raise ValueError(
        f"{folder}: expected u.data, ratings.dat, ratings.csv, NAME.inter, sequences.txt, *.parquet, "
        "id2name.txt with train, valid and test.jsonl, or a saved Hugging Face dataset; "
        f"found {', '.join(sorted(names)) or 'nothing'}."
    )
