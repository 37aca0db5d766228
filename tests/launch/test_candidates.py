"""A run as a retriever: its candidates are its own ranking, kept in the cache, and never of another run's weights."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.candidate_store import CandidateStore, as_test, training_cuts
from data.interactions import Interactions
from data.splits import Split
from evaluation.evaluator import Evaluator
from launch.candidates import Retriever
from launch.loading import load_model, load_run, read_and_split
from launch.setting import Setting

K = 6


@pytest.fixture(scope="module")
def data(trained: Path) -> tuple[Interactions, Split]:
    return read_and_split(load_run(trained).config.data)


@pytest.fixture
def setting(data: tuple[Interactions, Split], tmp_path: Path) -> Setting:
    interactions, parts = data
    return Setting(parts, interactions.catalog, None, None, 0, tmp_path / "cache", load_model)


def all_scores(folder: Path, parts: Split, phase: Any) -> torch.Tensor:
    built = load_model(folder)
    examples = built.require_full_ranking()(parts, phase)
    with torch.no_grad():
        return built.model(examples.collate(np.arange(len(examples.lengths)), 0))


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_candidates_are_the_best_unseen_items(trained: Path, setting: Setting, phase: Any) -> None:
    parts = setting.split
    store = Retriever(trained, setting).candidates(parts, phase, K)
    scores, targets = all_scores(trained, parts, phase), parts.targets(phase)
    for row, (user, position) in enumerate(zip(targets.user, targets.position, strict=True)):
        own = scores[row].clone()
        own[parts.history(int(user), int(position))] = -torch.inf
        best, items = own.sort(descending=True, stable=True)
        assert store.items[row].tolist() == items[:K].tolist()
        np.testing.assert_allclose(store.scores[row], best[:K], atol=1e-5)


def test_the_recall_of_the_store_is_the_hit_rate_of_the_retriever(trained: Path, setting: Setting) -> None:
    parts = setting.split
    built = load_model(trained)
    examples = built.require_full_ranking()(parts, "test")
    whole = examples.collate(np.arange(len(examples.lengths)), 0)
    measured = Evaluator(parts, "test", cutoffs=(K, 10)).run(built.model, [whole])
    store = Retriever(trained, setting).candidates(parts, "test", K)
    assert 0 < store.recall(parts.target_items("test")) == pytest.approx(measured.metrics[f"HR@{K}"])


def test_training_candidates_of_one_pass_are_those_of_a_pass_a_history(trained: Path, setting: Setting) -> None:
    """For every history that fits into one window; a longer one is read from where its window begins."""
    parts = setting.split
    store = Retriever(trained, setting).candidates(parts, "train", K)
    cuts = training_cuts(parts)
    assert len(store.items) == len(cuts)
    met = [set(parts.history(int(user), int(end)).tolist()) for user, end in zip(cuts.user, cuts.position, strict=True)]
    assert not any(set(row.tolist()) & seen for row, seen in zip(store.items, met, strict=True))
    scores = all_scores(trained, as_test(parts, cuts), "test")
    # Where the window of the one pass ends, as that of an evaluation does.
    last_of_window = cuts.position == parts.train_end[cuts.user] - 1
    assert last_of_window.sum() > 20
    for row in np.flatnonzero(last_of_window):
        own = scores[row].clone()
        own[list(met[row])] = -torch.inf
        assert store.items[row].tolist() == own.sort(descending=True, stable=True).indices[:K].tolist()


def test_a_store_is_kept_found_again_and_mended(
    trained: Path, setting: Setting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "shardrec")
    first = Retriever(trained, setting).candidates(setting.split, "test", K)
    assert f"asking {trained} for the top {K}" in caplog.text
    (file,) = (setting.cache / "candidates").glob("*.npz")
    with monkeypatch.context() as patched:
        patched.setattr(Retriever, "ask", lambda *_: pytest.fail("the candidates are known"))
        again = Retriever(trained, setting).candidates(setting.split, "test", K)
    assert np.array_equal(again.items, first.items)
    file.write_bytes(b"PK\x03\x04 half of it")
    mended = Retriever(trained, setting).candidates(setting.split, "test", K)
    assert "cannot be read" in caplog.text
    assert np.array_equal(mended.items, first.items)
    assert np.array_equal(CandidateStore.load(file, *first.items.shape).items, first.items)


def test_other_weights_have_other_candidates(trained: Path, setting: Setting, tmp_path: Path) -> None:
    first = Retriever(trained, setting).candidates(setting.split, "test", K)
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    weights = other / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-4096:] = bytes(4096)  # the last weights are zero
    weights.write_bytes(damaged)
    second = Retriever(other, setting).candidates(setting.split, "test", K)
    assert not np.array_equal(first.items, second.items)
    assert len(list((setting.cache / "candidates").glob("*.npz"))) == 2
    before, config = Retriever(other, setting).checksum, other / "model" / "config.json"
    config.write_text(config.read_text().replace('"seed": 42', '"seed": 43', 1))
    assert Retriever(other, setting).checksum != before, "settings say which members an ensemble has"


def test_a_retriever_that_is_not_there(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--method\.retriever.*no finished run"):
        Retriever(tmp_path / "nowhere", setting)
