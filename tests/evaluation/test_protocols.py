"""What each protocol lets compete with the target."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from data.splits import Phase, Split, Targets
from evaluation.protocols import Mask, Protocol, candidates_hash, draw_candidates, seen_pairs
from tests.toys import leave_one_out

SPLIT = leave_one_out([[1, 2, 3, 4], [5, 6, 5, 7, 8], [9, 1, 2]], num_items=10)


@pytest.mark.parametrize(
    ("phase", "mask", "expected"),
    [
        ("test", "full-history", [{1, 2, 3}, {5, 6, 7}, {9, 1}]),
        ("test", "train", [{1, 2}, {5, 6}, {9}]),
        ("test", "none", [set(), set(), set()]),
        ("valid", "full-history", [{1, 2}, {5, 6}, {9}]),
        ("valid", "train", [{1, 2}, {5, 6}, {9}]),
    ],
)
@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0]])
def test_masks(phase: Phase, mask: Mask, expected: list[set[int]], rows: list[int]) -> None:
    seen_rows, seen_items = seen_pairs(SPLIT, phase, mask, np.array(rows))
    assert [set(seen_items[seen_rows == place].tolist()) for place in range(len(rows))] == [
        expected[row] for row in rows
    ]


def test_training_mask_never_reaches_past_the_target() -> None:
    """With a target inside the training part, later training events are the future."""
    split = replace(SPLIT, test=Targets(np.array([1]), np.array([1])))
    _, seen_items = seen_pairs(split, "test", "train", np.array([0]))
    assert seen_items.tolist() == [5]


def wide_split(users: int = 300, num_items: int = 400) -> Split:
    rng = np.random.default_rng(0)
    return leave_one_out([list(rng.integers(1, num_items + 1, rng.integers(3, 150))) for _ in range(users)], num_items)


@pytest.mark.parametrize(("protocol", "size"), [("sampled-100", 101), ("candidates-20", 20)])
def test_candidates_are_distinct_unseen_and_hold_the_target(protocol: Protocol, size: int) -> None:
    split = wide_split()
    candidates = draw_candidates(split, "test", protocol, seed=1)
    assert candidates is not None
    assert candidates.shape == (300, size)
    for user, row in enumerate(candidates):
        history = set(split.history(user, split.test.position[user]).tolist())
        assert row[0] == split.target_items("test")[user]
        assert len(set(row.tolist())) == size
        assert not history & set(row[1:].tolist())
        assert row.min() >= 1
        assert row.max() <= split.num_items


def test_candidates_are_frozen_by_the_seed() -> None:
    split = wide_split()
    first, again, other = (draw_candidates(split, "test", "sampled-100", seed) for seed in (1, 1, 2))
    assert candidates_hash(first) == candidates_hash(again) != candidates_hash(other)
    assert candidates_hash(draw_candidates(split, "test", "full", 1)) is None


def test_negatives_are_uniform_over_unseen_items() -> None:
    split = leave_one_out([[1, 2, 3, 4]] * 4000, num_items=34)
    candidates = draw_candidates(split, "test", "candidates-20", seed=0)
    assert candidates is not None
    drawn = np.bincount(candidates[:, 1:].ravel(), minlength=35)
    assert drawn[:5].sum() == 0
    assert chisquare(drawn[5:]).pvalue > 0.001


def test_every_unseen_item_can_be_asked_for() -> None:
    split = leave_one_out([[1, 2, 3]], num_items=3 + 19)
    candidates = draw_candidates(split, "test", "candidates-20", seed=0)
    assert candidates is not None
    assert sorted(candidates[0].tolist()) == [3, *range(4, 23)]


def test_too_few_unseen_items_is_an_error_with_a_remedy() -> None:
    split = leave_one_out([list(range(1, 30)), list(range(1, 41))], num_items=50)
    with pytest.raises(ValueError, match=r"user u1 has 10 unseen items.*candidates-20.*--evaluation.protocol full"):
        draw_candidates(split, "test", "candidates-20", seed=0)
