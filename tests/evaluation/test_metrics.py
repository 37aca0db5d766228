"""Metrics against their definitions, written out for one user at a time."""

import math

import numpy as np
import pytest

from evaluation.metrics import Ties, coverage, multi_relevant_metrics, per_user_metrics

CUTOFFS = (1, 5, 10, 20)


@pytest.mark.parametrize("items", [50, 1682])
def test_a_constant_scorer_gets_its_share_of_the_catalogue(items: int) -> None:
    metrics = per_user_metrics(np.array([0]), np.array([items - 1]), CUTOFFS)
    for cutoff in CUTOFFS:
        assert metrics[f"HR@{cutoff}"][0] == pytest.approx(cutoff / items, abs=1e-15)
    pessimistic = per_user_metrics(np.array([0]), np.array([items - 1]), CUTOFFS, "pessimistic")
    assert all(values[0] == 0 for values in pessimistic.values())


@pytest.mark.parametrize("ties", ["expected", "pessimistic", "mid-rank", "optimistic"])
def test_a_perfect_scorer_gets_one(ties: Ties) -> None:
    metrics = per_user_metrics(np.array([0]), np.array([0]), CUTOFFS, ties)
    for name, values in metrics.items():
        assert values[0] == (1 / int(name.split("@")[1]) if name.startswith("Precision") else 1), name


def test_expected_ties_average_over_the_tied_positions() -> None:
    rng = np.random.default_rng(0)
    greater, equal = rng.integers(0, 30, 300), rng.integers(0, 40, 300)
    metrics = per_user_metrics(greater, equal, CUTOFFS)
    for row in range(300):
        positions = range(greater[row], greater[row] + equal[row] + 1)
        for cutoff in CUTOFFS:
            ndcg = [1 / math.log2(p + 2) if p < cutoff else 0 for p in positions]
            mrr = [1 / (p + 1) if p < cutoff else 0 for p in positions]
            assert metrics[f"NDCG@{cutoff}"][row] == pytest.approx(np.mean(ndcg), abs=1e-14)
            assert metrics[f"MRR@{cutoff}"][row] == pytest.approx(np.mean(mrr), abs=1e-14)
            in_top = np.clip((cutoff - greater[row]) / (equal[row] + 1), 0, 1)
            assert metrics[f"HR@{cutoff}"][row] == pytest.approx(in_top, abs=1e-15)


def test_random_scores_get_their_share() -> None:
    rng = np.random.default_rng(0)
    greater = rng.integers(0, 500, 200_000)  # the target's place among 500 items with random scores
    hit_rate = per_user_metrics(greater, np.zeros_like(greater), (10,))["HR@10"].mean()
    assert hit_rate == pytest.approx(10 / 500, abs=4 * math.sqrt(0.02 * 0.98 / 200_000))


def test_ndcg_of_several_relevant_items_is_normalised_by_what_is_achievable() -> None:
    relevant = np.zeros((2, 10), dtype=bool)
    relevant[0, :3] = relevant[1, :10] = True
    metrics = multi_relevant_metrics(relevant, np.array([3, 25]), (10,))
    np.testing.assert_allclose(metrics["NDCG@10"], 1.0)
    np.testing.assert_allclose(metrics["MAP@10"], [1.0, 10 / 25])
    np.testing.assert_allclose(metrics["MAP_recbole@10"], 1.0)


def test_one_relevant_item_gives_the_same_as_ranks_do() -> None:
    places = np.arange(20)
    relevant = np.eye(20, dtype=bool)
    several = multi_relevant_metrics(relevant, np.ones(20, dtype=np.int64), CUTOFFS)
    for name, values in per_user_metrics(places, np.zeros_like(places), CUTOFFS).items():
        np.testing.assert_allclose(several[name], values, atol=1e-15, err_msg=name)


def test_too_short_rankings_are_refused() -> None:
    with pytest.raises(ValueError, match="5 positions, cutoff 10"):
        multi_relevant_metrics(np.zeros((1, 5), dtype=bool), np.array([1]), (10,))


def test_coverage_counts_items_not_recommendations() -> None:
    recommendations = np.array([[1, 2, 0], [2, 3, 0]])
    assert coverage(recommendations, 10, 1) == 0.2
    assert coverage(recommendations, 10, 3) == 0.3
