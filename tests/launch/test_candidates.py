"""A run as a retriever: its candidates are its own ranking, kept in the cache, and never of another run's weights."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.candidate_store import CandidateStore, as_test, cut_rows, overlapping_spans, training_cuts
from data.interactions import Catalog
from data.splits import Split
from evaluation.evaluator import Evaluator
from launch import train
from launch.candidates import Retriever, best_of
from launch.earlier_runs import Asking
from launch.loading import load_model, load_run, read_and_split
from launch.setting import Setting
from tests.conftest import forget_accelerator
from tests.launch.conftest import FLAGS

K = 6


@pytest.fixture(scope="module")
def data(trained: Path) -> tuple[Catalog, Split]:
    return read_and_split(load_run(trained).config.data)


@pytest.fixture(scope="module")
def e4srec(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal backbone, not trained, on the same data."""
    folder = tmp_path_factory.mktemp("e4srec") / "run"
    flags = (
        "--model=e4srec --backbone.tiny.hidden_size 32 --backbone.tiny.layers 1 --method.prompts.max_history 8 "
        "--train.max_steps 0 --train.trackers [] --train.precision fp32"
    ).split()
    data = FLAGS[2 : FLAGS.index("--method.window")]
    assert train.main([*flags, *data, f"--output={folder}"]) == 0
    forget_accelerator()
    return folder


@pytest.fixture
def setting(data: tuple[Catalog, Split], tmp_path: Path) -> Setting:
    catalog, parts = data
    return Setting(parts, catalog, None, None, 0, tmp_path / "cache", load_model)


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


@pytest.mark.parametrize("model", ["sasrec", "e4srec"])
def test_training_candidates_of_one_pass_are_those_of_a_pass_a_history(
    model: str, trained: Path, e4srec: Path, setting: Setting
) -> None:
    """For every history that a window ends with (SASRec counts places from there), and any that fits into one."""
    parts, folder = setting.split, trained if model == "sasrec" else e4srec
    retriever = Retriever(folder, setting)
    every = retriever.load().every_position
    assert every is not None
    store, cuts = retriever.candidates(parts, "train", K), training_cuts(parts)
    assert len(store.items) == len(cuts)
    met = [set(parts.history(int(user), int(end)).tolist()) for user, end in zip(cuts.user, cuts.position, strict=True)]
    assert not any(set(row.tolist()) & seen for row, seen in zip(store.items, met, strict=True))
    scores = all_scores(folder, as_test(parts, cuts), "test")
    spans = overlapping_spans(parts, every.window)
    same = set(cut_rows(parts, spans[:, 0], spans[:, 3]).tolist())
    if model == "e4srec":
        same |= set(np.flatnonzero(cuts.position <= every.window).tolist())
    assert len(same) > 60
    for row in same:
        own = scores[row].clone()
        own[list(met[row])] = -torch.inf
        best, items = own.sort(descending=True, stable=True)
        assert store.items[row].tolist() == items[:K].tolist()
        np.testing.assert_allclose(store.scores[row], best[:K], atol=1e-5)
    some = np.arange(3, len(cuts), 7)
    part = best_of(retriever.load(), Asking.like([retriever.run]), parts, "train", K, some)
    assert np.array_equal(part.items, store.items[some])
    np.testing.assert_allclose(part.scores, store.scores[some], atol=1e-5)


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
