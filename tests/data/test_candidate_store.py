"""Stored candidates: what is in them, where a target stands, files that are damaged, and rows of training events."""

from pathlib import Path

import numpy as np
import pytest

from data.candidate_store import CandidateStore, as_test, cut_rows, overlapping_spans, store_name, training_cuts
from data.config import DataConfig
from data.sources import read
from data.splits import Split, split

STORE = CandidateStore(np.array([[4, 2, 9], [7, 1, 3]], np.int32), np.array([[3, 2, 1], [0.5, 0, -1]], np.float32))


@pytest.fixture(scope="module")
def parts() -> Split:
    config = DataConfig(source="sample", sample_users=40, sample_series=20)
    return split(read(config), config)


def test_places_and_recall() -> None:
    assert STORE.places(np.array([9, 8])).tolist() == [2, -1]
    assert STORE.recall(np.array([9, 8])) == 0.5


def test_a_row_with_fewer_candidates_is_refused_with_the_flag() -> None:
    short = CandidateStore(np.array([[4, 0, 0]], np.int32), np.array([[1, -np.inf, -np.inf]], np.float32))
    with pytest.raises(ValueError, match=r"only 1 items.*--method\.num_candidates 3"):
        short.require_full("--method.num_candidates")
    assert STORE.require_full("--method.num_candidates") is STORE


def test_a_store_is_read_back_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "there" / "store.npz"
    STORE.save(path)
    again = CandidateStore.load(path, 2, 3)
    assert np.array_equal(again.items, STORE.items)
    assert np.array_equal(again.scores, STORE.scores)
    assert [file.name for file in path.parent.iterdir()] == ["store.npz"]
    with pytest.raises(ValueError, match="expected"):
        CandidateStore.load(path, 3, 3)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cannot be read"):
        CandidateStore.load(path, 2, 3)


def test_training_cuts_ask_for_training_events_only(parts: Split) -> None:
    cuts = training_cuts(parts)
    assert len(cuts) == sum(max(end - 1, 0) for end in parts.train_end)
    assert (cuts.position >= 1).all()
    assert (cuts.position < parts.train_end[cuts.user]).all(), "no validation or test target among them"
    assert np.array_equal(cut_rows(parts, cuts.user, cuts.position), np.arange(len(cuts)))
    asked = as_test(parts, cuts)
    assert asked.target_items("test")[5] == parts.history(cuts.user[5], cuts.position[5] + 1)[-1]
    assert not asked.hash


def test_the_name_changes_with_weights_phase_size_and_rows(parts: Split) -> None:
    names = [
        store_name(parts, "test", 20, "a"),
        store_name(parts, "test", 20, "b"),
        store_name(parts, "valid", 20, "a"),
        store_name(parts, "train", 20, "a"),
        store_name(parts, "test", 10, "a"),
    ]
    assert len(set(names)) == len(names)
    assert store_name(parts, "test", 20, "a") == names[0]


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_overlapping_windows_answer_every_training_event_once(parts: Split, window: int) -> None:
    spans, cuts = overlapping_spans(parts, window), training_cuts(parts)
    answered = [(user, cut) for user, start, first, end in spans.tolist() for cut in range(first + 1, end + 1)]
    assert answered == list(zip(cuts.user.tolist(), cuts.position.tolist(), strict=True))
    for user, start, first, end in spans.tolist():
        assert end - start <= window
        assert end < parts.train_end[user]
        assert first + 1 - start >= min(first + 1, (window + 1) // 2)
