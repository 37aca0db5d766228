"""Write the item vectors of a dense-retrieval run as a FAISS index, and measure what it finds of the exact search.

python launch/index.py --run runs/NAME --kind ivf-flat --to items.faiss

Position i of the index is item i + 1 of model/catalog.json. A catalogue that fits in memory needs none: a full product
is exact, and launch/recommend.py takes it.
"""

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

import numpy as np
import torch

from data.loaders import EvaluationLoader, Share
from launch.loading import LoadedRun, load_run, read_data_of
from launch.parser import SettingsParser
from models.dense_retrieval import DenseRetrieval
from models.devices import own_device

PARTS_PER_BYTE = 4  # of a vector: product quantisation keeps one byte for so many numbers
CODES = 256  # values of such a byte: fewer items than these cannot teach it


@dataclass(kw_only=True)
class IndexConfig:
    """Which index to make."""

    run: Path
    """Run folder."""
    to: Path
    """File to write."""
    kind: Literal["flat", "ivf-flat", "ivf-pq"] = "ivf-flat"
    """Every vector compared; those in the nearest cells compared; the same with a byte for every four numbers."""
    probes: int = 8
    """Cells that a search looks into; there are as many as the square root of the catalogue."""
    k: int = 10
    """Recall is measured among so many nearest items."""


def main(argv: list[str]) -> int:
    config = SettingsParser(prog="launch/index.py", description=__doc__).read_as(IndexConfig, argv)
    run = load_run(config.run)
    model = run.built.model
    if not isinstance(model, DenseRetrieval):
        sys.exit(f"error: --run {config.run} is {run.config.model}: expected a run of dense-retrieval")
    model.to(own_device())
    with torch.inference_mode():
        items = model.evaluated()[1:].cpu().numpy()
        users = users_of(run, model)
    index = build(config, items)
    library().write_index(index, str(config.to))
    exact = np.argsort(-(users @ items.T), axis=1, kind="stable")[:, : config.k]
    started = time.perf_counter()
    _, found = index.search(users, config.k)
    seconds = time.perf_counter() - started
    print(
        f"{config.to}: {config.kind} of {len(items):,} items, {config.to.stat().st_size / 2**20:.1f} MiB; "
        f"recall@{config.k} against the exact search {recall(found, exact):.4f} over {len(users):,} test users, "
        f"{1e3 * seconds / len(users):.3f} ms each"
    )
    return 0


def users_of(run: LoadedRun, model: DenseRetrieval) -> np.ndarray:
    """Return the users of the test as vectors, [n, D]."""
    examples = run.built.evaluation_among(read_data_of(run), "test", None)
    loader = EvaluationLoader(examples, run.config.train.eval_batch_size, Share(), own_device())
    return np.concatenate([model(batch, "encode_users").cpu().numpy() for batch in loader])


def build(config: IndexConfig, items: np.ndarray) -> Any:
    """Return the index of item vectors [N, D], by their products; exit where there are too few for its kind."""
    count, width = items.shape
    if config.kind == "ivf-pq" and (count < CODES or width % PARTS_PER_BYTE):
        sys.exit(
            f"error: --kind ivf-pq learns {CODES} codes for each {PARTS_PER_BYTE} numbers, and there are {count} items "
            f"of {width}: pass --kind ivf-flat"
        )
    cells = round(count**0.5)
    descriptions = {"flat": "Flat", "ivf-flat": f"IVF{cells},Flat", "ivf-pq": f"IVF{cells},PQ{width // PARTS_PER_BYTE}"}
    faiss = library()
    index = faiss.index_factory(width, descriptions[config.kind], faiss.METRIC_INNER_PRODUCT)
    index.train(items)
    index.add(items)
    if config.kind != "flat":
        index.nprobe = config.probes
    return index


def library() -> Any:
    """Return FAISS; exit where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        sys.exit('error: launch/index.py needs FAISS: pip install -e ".[faiss]"')


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the part of the exact nearest items, [n, k], that is among the found ones."""
    return float(np.mean([len(np.intersect1d(*rows)) / exact.shape[1] for rows in zip(found, exact, strict=True)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
