"""How good a teacher's orders are, beside those of the retriever whose candidates it has judged."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .metrics import per_user_metrics

CUTOFF = 10


def kendall_tau(ranks_RK: np.ndarray, others_RK: np.ndarray) -> np.ndarray:
    """Pairs of candidates in the same order minus pairs in the other one, over all pairs, [R]: tau-a, 1 for equal."""
    first, second = np.triu_indices(ranks_RK.shape[1], 1)
    ours, theirs = (np.sign(ranks[:, first] - ranks[:, second]) for ranks in (ranks_RK, others_RK))
    return (ours * theirs).mean(axis=1)


def audit(ranks_RK: np.ndarray, places_R: np.ndarray, statuses: Sequence[str]) -> dict[str, Any]:
    """The figures of a file of labels.

    `ranks_RK` are the teacher's, 1 for the best, of candidates in the retriever's order; `places_R` says where among
    them the item that came next is, -1 where it is not one of them, which counts as zero for both. Answers that could
    not be read keep the retriever's order.
    """
    found = places_R >= 0
    own = np.take_along_axis(ranks_RK, np.maximum(places_R, 0)[:, None], axis=1)[:, 0] - 1
    teacher, retriever = (_ndcg(np.where(found, place, CUTOFF)) for place in (own, places_R))
    return {
        "lists": len(ranks_RK),
        "candidates": ranks_RK.shape[1],
        "next item among them": float(found.mean()),
        f"teacher NDCG@{CUTOFF}": float(teacher.mean()),
        f"retriever NDCG@{CUTOFF}": float(retriever.mean()),
        "lists where the teacher is better": float((teacher > retriever).mean()),
        "lists where it is worse": float((teacher < retriever).mean()),
        "Kendall tau with the retriever": float(
            kendall_tau(ranks_RK, np.broadcast_to(np.arange(ranks_RK.shape[1]), ranks_RK.shape)).mean()
        ),
        "answers": dict(Counter(statuses)),
    }


def _ndcg(place_R: np.ndarray) -> np.ndarray:
    return per_user_metrics(place_R, np.zeros_like(place_R), (CUTOFF,))[f"NDCG@{CUTOFF}"]
