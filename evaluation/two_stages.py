"""Figures of a ranking of retrieved candidates: the ceiling, users whose target was found, and the retriever alone."""

from typing import Any

import numpy as np

from .metrics import per_user_metrics
from .results import Evaluation


def two_stage_figures(evaluation: Evaluation, places: np.ndarray, k: int) -> dict[str, Any]:
    """Return what an evaluation of reranked candidates means, for results.json.

    `places` [n] is where the retriever has each row's target among its k, from 0; -1 where it has not. "recall" is the
    share of targets that were found, the ceiling of every hit rate up to k. "subset" are the metrics over those users,
    "retriever_subset" the retriever's own over the same users, and "retriever" over all: only up to cutoff k, where a
    target that was not found counts as zero. Over all users the ranking's own metrics are those of the evaluation,
    which equal share * subset + (1 - share) * 0.
    """
    found = places >= 0
    options = [cutoff for cutoff in evaluation.header["cutoffs"] if cutoff <= k]
    ties = evaluation.header["ties"]
    ranks = evaluation.ranks
    ranked = per_user_metrics(ranks.greater[found], ranks.equal[found], options, ties)
    alone = per_user_metrics(np.where(found, places, k), np.zeros_like(places), options, ties)
    return {
        "recall": float(found.mean()),
        "users_found": int(found.sum()),
        "subset": _means(ranked),
        "retriever_subset": _means({name: values[found] for name, values in alone.items()}),
        "retriever": _means(alone),
    }


def _means(per_user: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) if values.size else 0.0 for name, values in per_user.items()}
