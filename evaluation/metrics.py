"""Ranking metrics as pure functions of ranks: NumPy, float64, one value a user, no loop over users.

With one target a user, at 0-based position p, each metric is a gain of p that is cut to 0 from position K on:

    HR@K = Recall@K = 1    MRR@K = MAP@K = 1 / (p + 1)    NDCG@K = 1 / log2(p + 2)    Precision@K = HR@K / K
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Ties = Literal["expected", "pessimistic", "mid-rank", "optimistic"]

_GAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "HR": np.ones_like,
    "NDCG": lambda position: 1.0 / np.log2(position + 2.0),
    "MRR": lambda position: 1.0 / (position + 1.0),
}


def per_user_metrics(
    greater: np.ndarray, equal: np.ndarray, cutoffs: Sequence[int], ties: Ties = "expected"
) -> dict[str, np.ndarray]:
    """Every metric at every cutoff, "NDCG@10" -> [n] float64, from the counts of `count_ranks` (both [n]).

    `ties` says where among the positions greater .. greater + equal the target stands:
    "expected" averages the metric over all of them (a constant scorer over n items gets HR@K = K / n);
    "pessimistic" takes the last; "mid-rank" the middle, which may be half a position;
    "optimistic" takes the first, which lets a constant scorer win: only to compare with code that does so.
    """
    metrics: dict[str, np.ndarray] = {}
    for cutoff in cutoffs:
        gains = {name: _gain_under_ties(name, greater, equal, cutoff, ties) for name in _GAINS}
        metrics[f"HR@{cutoff}"] = metrics[f"Recall@{cutoff}"] = gains["HR"]
        metrics[f"NDCG@{cutoff}"] = gains["NDCG"]
        metrics[f"MRR@{cutoff}"] = metrics[f"MAP@{cutoff}"] = gains["MRR"]
        metrics[f"Precision@{cutoff}"] = gains["HR"] / cutoff
    return metrics


def _gain_under_ties(name: str, greater: np.ndarray, equal: np.ndarray, cutoff: int, ties: Ties) -> np.ndarray:
    gain = _GAINS[name]
    if ties == "expected":
        # The mean over the tied positions that lie before the cutoff is a difference of two cumulative sums.
        cumulative = np.concatenate([[0.0], np.cumsum(gain(np.arange(cutoff, dtype=np.float64)))])
        first = np.minimum(greater, cutoff)
        end = np.minimum(greater + equal + 1, cutoff)
        return (cumulative[end] - cumulative[first]) / (equal + 1)
    share_of_ties_ahead = {"optimistic": 0.0, "mid-rank": 0.5, "pessimistic": 1.0}[ties]
    position = greater + share_of_ties_ahead * equal
    return np.where(position < cutoff, gain(position), 0.0)


def multi_relevant_metrics(
    relevant_UK: np.ndarray, num_relevant_U: np.ndarray, cutoffs: Sequence[int]
) -> dict[str, np.ndarray]:
    """The same metrics for users with several relevant items, "MAP@10" -> [U] float64.

    `relevant_UK` [U, K] bool says whether the item at each position of the ranking is relevant (K at least
    the largest cutoff; False past the end of a short ranking); `num_relevant_U` counts the relevant items a
    user, ranked or not. NDCG is normalised by what is achievable, min(K, relevant) hits. "MAP" divides by the
    number of relevant items (trec_eval), "MAP_recbole" by min(K, relevant), as RecBole does.
    """
    if relevant_UK.shape[1] < max(cutoffs):
        raise ValueError(f"rankings have {relevant_UK.shape[1]} positions, cutoff {max(cutoffs)} needs more")
    hits = relevant_UK.astype(np.float64)
    positions = np.arange(1, hits.shape[1] + 1, dtype=np.float64)
    hits_so_far = hits.cumsum(axis=1)
    discount = 1.0 / np.log2(positions + 1.0)
    reciprocal_of_first = np.where((hits_so_far == 1) & relevant_UK, 1.0 / positions, 0.0).cumsum(axis=1)
    gain = (hits * discount).cumsum(axis=1)
    ideal_gain = np.concatenate([[0.0], discount.cumsum()])
    precision_at_hits = (hits * hits_so_far / positions).cumsum(axis=1)

    metrics: dict[str, np.ndarray] = {}
    for cutoff in cutoffs:
        last = cutoff - 1
        achievable = np.minimum(num_relevant_U, cutoff)
        metrics[f"HR@{cutoff}"] = (hits_so_far[:, last] > 0).astype(np.float64)
        metrics[f"Recall@{cutoff}"] = hits_so_far[:, last] / num_relevant_U
        metrics[f"Precision@{cutoff}"] = hits_so_far[:, last] / cutoff
        metrics[f"MRR@{cutoff}"] = reciprocal_of_first[:, last]
        metrics[f"NDCG@{cutoff}"] = gain[:, last] / ideal_gain[achievable]
        metrics[f"MAP@{cutoff}"] = precision_at_hits[:, last] / num_relevant_U
        metrics[f"MAP_recbole@{cutoff}"] = precision_at_hits[:, last] / achievable
    return metrics


def coverage(recommendations: np.ndarray, num_items: int, cutoff: int) -> float:
    """Share of the catalogue among all first `cutoff` recommendations, [n, k] item ids with 0 for none."""
    recommended = np.unique(recommendations[:, :cutoff])
    return np.count_nonzero(recommended) / num_items
