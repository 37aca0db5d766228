"""FAISS indexes of item vectors: exact where they compare all, near it where they do not."""

from pathlib import Path

import numpy as np
import pytest

from launch import index

KINDS = {"flat": 1.0, "ivf-flat": 0.5, "ivf-pq": 0.2}


@pytest.fixture(scope="module")
def vectors() -> tuple[np.ndarray, np.ndarray]:
    """Items around some centres, and users near items."""
    random = np.random.default_rng(0)
    items = random.normal(size=(20, 32)).repeat(30, axis=0) + 0.5 * random.normal(size=(600, 32))
    users = items[::7] + 0.1 * random.normal(size=items[::7].shape)
    return tuple((v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in (items, users))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_recall_against_the_exact_search(vectors, kind) -> None:
    pytest.importorskip("faiss", reason='FAISS is not installed: pip install -e ".[faiss]"')
    items, users = vectors
    exact = np.argsort(-(users @ items.T), axis=1)[:, :10]
    config = index.IndexConfig(run=Path("unused"), to=Path("unused"), kind=kind, probes=4)
    found = index.build(config, items).search(users, 10)[1]
    assert index.recall(found, exact) >= KINDS[kind]
    if kind == "ivf-flat":
        config.probes = 10**6
        assert index.recall(index.build(config, items).search(users, 10)[1], exact) == 1


def test_recall_counts_what_was_found() -> None:
    exact = np.array([[1, 2], [3, 4]])
    assert index.recall(np.array([[2, 9], [4, 3]]), exact) == 0.75
    assert index.recall(exact + 10, exact) == 0


def test_too_few_items_for_codes_are_refused() -> None:
    config = index.IndexConfig(run=Path("unused"), to=Path("unused"), kind="ivf-pq")
    with pytest.raises(SystemExit, match="--kind ivf-pq"):
        index.build(config, np.zeros((100, 32), np.float32))


def test_a_run_of_ids_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is sasrec: expected a run of dense-retrieval"):
        index.main(["--run", str(trained), "--to", str(tmp_path / "items.faiss")])
