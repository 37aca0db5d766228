"""Grounding of generated titles in the catalogue (BIGRec, arXiv 2308.08434): distances, injection, matches.

Axes: B users, N items, H width, G gammas. Column i of a [B, N] tensor belongs to item i + 1: there is none
for padding until `catalog_scores` adds it. In distances and what is made of them smaller is better.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

# The published grids: gamma of a collaborative weight, and gamma of popularity.
CF_GAMMAS = (*(step / 100 for step in range(100)), *range(1, 100))
POPULARITY_GAMMAS = tuple(range(100))

SLACK = 1e-12  # metrics that differ by less are equal: means are summed in another order for each gamma
CHUNK_ELEMENTS = 2**20  # of [G, B, N] at once, while gammas are searched: near the caches of a CPU


def title_distances(text_BH: Tensor, title_NH: Tensor, metric: Literal["l2", "cosine"] = "l2") -> Tensor:
    """Distance of each embedded text to each embedded title, [B, N]; L2 as published, or 1 - cosine."""
    if metric == "cosine":
        return 1 - normalize(text_BH, dim=-1) @ normalize(title_NH, dim=-1).T
    # Not by |a|^2 - 2ab + |b|^2: it loses the small distances, which decide the ranking.
    return torch.cdist(text_BH, title_NH, compute_mode="donot_use_mm_for_euclid_dist")


def min_max(value: Tensor) -> Tensor:
    """The last axis scaled to 0..1; all 0 where it is constant."""
    low, high = value.aminmax(dim=-1, keepdim=True)
    return (value - low) / torch.where(high > low, high - low, 1)


def popularity_weight(count_N: Tensor) -> Tensor:
    """Popularity W of each item in 0..1 from its interactions, [N], float64: the same for all users."""
    return min_max(count_N.double() / count_N.sum().clamp(min=1))


def collaborative_weight(score_BN: Tensor) -> Tensor:
    """Collaborative W in 0..1 from the scores of an ID recommender, [B, N]: per user."""
    return min_max(score_BN)


def inject(distance_norm_BN: Tensor, weight: Tensor, gamma: Tensor | float) -> Tensor:
    """Bend distances in 0..1 by a weight W [N] or [B, N]: (1 + W)^(-gamma) * Dn.

    The nearest item has Dn = 0 and stays first, whatever W says of the others.
    """
    return (1 + weight) ** -gamma * distance_norm_BN


def combine_beams(distance_BGN: Tensor, temperature: float | None = None) -> Tensor:
    """One distance an item from those of all G generated texts: the smallest, or the soft minimum, [B, N].

    The soft minimum is -t log mean exp(-D / t); it nears the smallest as the temperature t falls.
    """
    if temperature is None:
        return distance_BGN.amin(dim=-2)
    beams = torch.tensor(float(distance_BGN.shape[-2]), device=distance_BGN.device)
    return -temperature * (torch.logsumexp(-distance_BGN / temperature, dim=-2) - beams.log())


def catalog_scores(distance_BN: Tensor) -> Tensor:
    """Catalogue scores [B, N + 1] float32, higher is better, with -inf for the padding item in column 0."""
    return torch.nn.functional.pad(-distance_BN.float(), (1, 0), value=float("-inf"))


# --- Ranks and gamma ---


def title_groups(titles: Sequence[str]) -> Tensor:
    """The first column that has the same title, [N]: items with one title cannot be told apart by text."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(title, column) for column, title in enumerate(titles)])


def target_ranks(value: Tensor, target_B: Tensor, group_N: Tensor | None = None) -> Tensor:
    """Rank of each user's target column, 0 is best: how many of [..., B, N] values are smaller, [..., B].

    With groups, the best rank of all items that share the target's title.
    """
    if group_N is None:
        at_target = value.gather(-1, target_B.expand(value.shape[:-1]).unsqueeze(-1))
    else:
        same_title = group_N == group_N[target_B].unsqueeze(-1)
        at_target = value.masked_fill(~same_title, float("inf")).amin(dim=-1, keepdim=True)
    return (value < at_target).sum(dim=-1)


def ranks_per_gamma(
    distance_norm_BN: Tensor,
    weight: Tensor,
    target_B: Tensor,
    gamma_G: Tensor,
    group_N: Tensor | None = None,
) -> Tensor:
    """Rank of each user's target under every gamma, [G, B], in chunks of gammas and users."""
    # Logarithms have the order of the injected distances, at one product and one difference a gamma.
    log_distance = distance_norm_BN.log()
    log_base = torch.log1p(weight).expand_as(log_distance)
    num_users, num_items = log_distance.shape
    users = max(1, min(num_users, CHUNK_ELEMENTS // num_items))
    gammas = max(1, CHUNK_ELEMENTS // (users * num_items))
    gamma_G11 = gamma_G.to(log_distance).view(-1, 1, 1)
    ranks = [
        torch.cat(
            [
                target_ranks(log_distance[rows] - gamma * log_base[rows], target_B[rows], group_N)
                for gamma in gamma_G11.split(gammas)
            ]
        )
        for rows in (slice(start, start + users) for start in range(0, num_users, users))
    ]
    return torch.cat(ranks, dim=1)


def hit_rate_and_ndcg(rank_B: Tensor, cutoffs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """HR and NDCG at each cutoff K from ranks [..., B] of one target a user, [..., K] float64."""
    hit = rank_B.unsqueeze(-1) < torch.tensor(cutoffs, device=rank_B.device)
    gain = 1 / torch.log2(rank_B.double() + 2)
    return hit.double().mean(dim=-2), (hit * gain.unsqueeze(-1)).mean(dim=-2)


@dataclass(frozen=True)
class GammaSearch:
    """The best gammas on validation: for each metric and cutoff, as published, and one for all of them."""

    hr: Tensor  # [K]
    ndcg: Tensor  # [K]
    shared: Tensor  # scalar: best mean NDCG over the cutoffs
    valid_hr: Tensor  # [K], reached with `hr`
    valid_ndcg: Tensor  # [K], reached with `ndcg`


def search_gamma(
    distance_norm_BN: Tensor,
    weight: Tensor,
    target_B: Tensor,
    gammas: Sequence[float],
    cutoffs: Sequence[int],
    group_N: Tensor | None = None,
    without_hits: float = 0.0,
) -> GammaSearch:
    """Try ascending gammas on validation users; the smallest of equally good ones wins.

    `without_hits` is the gamma where none reaches a single hit (the published script ends with -1).
    """
    gamma_G = torch.tensor(gammas, dtype=torch.float64, device=distance_norm_BN.device)
    ranks_GB = ranks_per_gamma(distance_norm_BN, weight, target_B, gamma_G, group_N)
    hr_GK, ndcg_GK = hit_rate_and_ndcg(ranks_GB, cutoffs)

    def best(metric_GK: Tensor) -> Tensor:
        top = metric_GK.amax(dim=0)
        first = (metric_GK >= top - SLACK).int().argmax(dim=0)
        return torch.where(top > SLACK, gamma_G[first], without_hits)

    shared = best(ndcg_GK.mean(dim=1, keepdim=True)).squeeze(0)
    return GammaSearch(best(hr_GK), best(ndcg_GK), shared, hr_GK.amax(dim=0), ndcg_GK.amax(dim=0))


# --- Text against titles ---

MIN_SUBSTRING = 4  # characters; shorter texts are part of some title by chance


def match_titles(texts: Sequence[str], titles: Sequence[str], substring: bool = False) -> Tensor:
    """Which items a generated text names, [B, N] bool: none, one, or all that share the title.

    Case, quotes and runs of blanks do not count. With `substring`, a text without an exact match names the
    only title that contains it: a fallback of grounding, say with a distance of 0, and never a metric, for it
    would count hits that are none.
    """
    columns = defaultdict(list)
    for column, title in enumerate(titles):
        columns[_normalised(title)].append(column)
    matches = torch.zeros(len(texts), len(titles), dtype=torch.bool)
    for row, text in enumerate(map(_normalised, texts)):
        named = [text] if text and text in columns else []
        if substring and not named and len(text) >= MIN_SUBSTRING:
            containing = [title for title in columns if text in title]
            named = containing if len(containing) == 1 else []
        for title in named:
            matches[row, columns[title]] = True
    return matches


def _normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(' "').casefold()
