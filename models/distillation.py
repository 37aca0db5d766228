"""Losses by which a student learns from a teacher's lists, best first: DLLM2Rec's and the ones it is compared with.

Source: Cui et al., "Distillation Matters: Empowering Sequential Recommenders to Match the Performance of Large Language
Models", arXiv 2405.00338. T rows, K candidates of each, N items by column; every loss is a sum over rows.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .listwise_losses import weighted_ranknet

FLOOR = 1e-8  # of confidence and consistency, as published
LOG_FLOOR = 1e-24  # inside the logarithm of the robust term, as published


@dataclass
class RankingConfig:
    """How much the teacher's lists count, and by which loss."""

    loss: Literal["intended", "paper", "published", "softmax", "rd", "dcd", "listwise", "ranknet", "none"] = "intended"
    """What is learned of a list. DLLM2Rec: each candidate as a positive beside one sampled negative (intended), the
    same with the slips of its code (published), or positives alone (paper). softmax: the weights as soft labels of a
    softmax over the catalogue, for students that are trained by one. Others': rd, dcd, listwise (KL), ranknet."""
    weight: float = 0.7
    """Factor of this loss beside the student's own (lambda)."""
    position: float = 0.3
    """Share of the position weight, which falls with a candidate's place in the list."""
    confidence: float = 0.5
    """Share of the confidence weight: exp(-distance) of each candidate; loss paper: of the true next item."""
    consistency: float = 0.1
    """Share of the consistency weight: is the candidate among the student's own best K?"""
    position_temperature: float = 1.0
    """The position weight of place r is exp(-r / this)."""
    temperature: float = 1.0
    """Of listwise and ranknet: scores of the student (and the teacher) are divided by it."""
    discrepancy: float = 1.0
    """Of rd and dcd: how fast the weight of an item grows with the places by which the student misranks it."""

    def __post_init__(self) -> None:
        for name in ("weight", "position", "confidence", "consistency"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"--method.ranking.{name} {value}: expected at least 0")
        for name in ("position_temperature", "temperature", "discrepancy"):
            if (value := getattr(self, name)) <= 0:
                raise ValueError(f"--method.ranking.{name} {value}: expected a number above 0")
        if self.weighs and not self.position + self.confidence + self.consistency:
            raise ValueError(
                f"--method.ranking.loss {self.loss} needs --method.ranking.position, confidence or consistency above 0"
            )

    @property
    def weighs(self) -> bool:
        """Whether the loss uses the three weights."""
        return self.loss in ("intended", "paper", "published", "softmax")

    @property
    def samples(self) -> bool:
        """Whether the loss uses a negative of each row."""
        return self.loss in ("intended", "published")


@dataclass
class RobustConfig:
    """Distributionally robust optimisation (DROS, Yang et al., arXiv 2210.12316), added to the losses."""

    weight: float = 0.0
    """Factor of the robust term of the target, and of each candidate in the losses intended and published (alpha)."""
    temperature: float = 1.0
    """beta: the larger, the closer to the average case."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"--method.robust.weight {self.weight}: expected at least 0")
        if self.temperature <= 0:
            raise ValueError(f"--method.robust.temperature {self.temperature}: expected a number above 0")


class Lists(NamedTuple):
    """What a teacher says of T rows, and what is known of them."""

    items_TK: Tensor  # int64 columns, best first
    distance_TK: Tensor  # the smaller, the surer
    target_T: Tensor  # int64 columns
    target_distance_T: Tensor  # of the true next item; inf where the teacher does not name it
    negative_T: Tensor | None  # int64 columns

    def of(self, rows: slice) -> "Lists":
        """Return those of some rows."""
        return Lists(
            self.items_TK[rows],
            self.distance_TK[rows],
            self.target_T[rows],
            self.target_distance_T[rows],
            None if self.negative_T is None else self.negative_T[rows],
        )


def position_weights(count: int, temperature: float, device: torch.device | None = None) -> Tensor:
    """exp(-r / temperature) for r = 1..K, divided by its sum, [K]."""
    return torch.softmax(-torch.arange(1, count + 1, device=device) / temperature, dim=0)


def confidence_weights(distance_TK: Tensor) -> Tensor:
    """exp(-distance) of each candidate, divided by the sum over them, [T, K]."""
    confidence_TK = (-distance_TK).exp() + FLOOR
    return confidence_TK / confidence_TK.sum(1, keepdim=True)


def in_students_top(scores_TN: Tensor, items_TK: Tensor) -> Tensor:
    """Which candidates are among the student's K best, [T, K] bool."""
    last_of_top = scores_TN.topk(items_TK.shape[1], dim=1).values[:, -1:]
    return scores_TN.gather(1, items_TK) >= last_of_top


@torch.no_grad()
def importance_weights(scores_TN: Tensor, lists: Lists, config: RankingConfig) -> Tensor:
    """The weighted sum of the three weights, [T, K]; a row sums to 1 but for the loss `paper`.

    `paper` is the text read literally: confidence is that of the true next item, and nothing is divided.
    """
    weight_TK = config.position * position_weights(
        lists.items_TK.shape[1], config.position_temperature, scores_TN.device
    ).expand(lists.items_TK.shape)
    if config.consistency:
        top_TK = in_students_top(scores_TN, lists.items_TK).float()
        weight_TK = weight_TK + config.consistency * (top_TK if config.loss == "paper" else top_TK + FLOOR)
    if config.loss == "paper":
        return weight_TK + config.confidence * (-lists.target_distance_T[:, None]).exp()
    if config.confidence:
        weight_TK = weight_TK + config.confidence * confidence_weights(lists.distance_TK)
    return weight_TK / weight_TK.sum(1, keepdim=True)


@torch.no_grad()
def discrepancy_weights(scores_TN: Tensor, items_TK: Tensor, config: RankingConfig) -> Tensor:
    """Position weight times tanh(how many places the student ranks a candidate below the teacher), [T, K].

    Source: Tang and Wang, "Ranking Distillation", arXiv 1809.07428, whose ranks are estimated; these are exact.
    """
    missed_TK = underestimated(scores_TN, items_TK, config.discrepancy)
    weight_TK = missed_TK * position_weights(items_TK.shape[1], config.position_temperature, items_TK.device)
    return weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=FLOOR)


def underestimated(scores_TN: Tensor, items_TK: Tensor, steepness: float) -> Tensor:
    """tanh(steepness * how many places the student ranks a candidate below the teacher), [T, K]; never below 0."""
    ascending_TN = scores_TN.sort(dim=1).values
    rank_TK = scores_TN.shape[1] + 1 - torch.searchsorted(ascending_TN, scores_TN.gather(1, items_TK), right=True)
    place_K = torch.arange(1, items_TK.shape[1] + 1, device=items_TK.device)
    return (steepness * (rank_TK - place_K)).clamp(min=0).tanh()


def dual_correction(scores_TN: Tensor, items_TK: Tensor, steepness: float) -> Tensor:
    """What the student ranks too low is drawn up in the teacher's order, above what it ranks too high; a sum over rows.

    As if the underestimated candidates u_1, u_2, ... were drawn in the teacher's order out of them and the
    overestimated items o: sum_j log(sum_{i >= j} exp s(u_i) + sum_o exp s(o)) - s(u_j). Each u_j counts, and each u_i
    and o competes, as much as the student misranks it. The o are what the list lacks: also items met before, and the
    next item where the teacher does not name it.

    Source: Lee and Kim, "Dual Correction Strategy for Ranking Distillation in Top-N Recommender System", arXiv
    2109.03459, its user side. They draw items by their discrepancy, which is a weight here; a list tells the teacher's
    rank of its K candidates, so of other items those can be overestimated that stand among the student's best K.
    """
    count = items_TK.shape[1]
    with torch.no_grad():
        under_TK = underestimated(scores_TN, items_TK, steepness)
        best_TK = scores_TN.topk(count, dim=1).indices
        strange_TK = (best_TK[:, :, None] != items_TK[:, None, :]).all(2)
        gap_K = count + 1 - torch.arange(1, count + 1, device=items_TK.device)  # to the best rank that they can have
        over_TK = strange_TK * (steepness * gap_K).tanh()
    tiny = torch.finfo(torch.float32).tiny  # instead of 0, whose logarithm has no gradient
    own_TK = scores_TN.gather(1, items_TK)
    behind_TK = (own_TK + under_TK.clamp(min=tiny).log()).flip(1).logcumsumexp(1).flip(1)
    rivals_TK = scores_TN.gather(1, best_TK) + over_TK.clamp(min=tiny).log()
    both_TK = torch.logaddexp(behind_TK, rivals_TK.logsumexp(1, keepdim=True))
    return (under_TK * (both_TK - own_TK)).sum()


def robust_terms(scores_TN: Tensor, propensity_N: Tensor, temperature: float, items_TK: Tensor) -> Tensor:
    """log(sum_i exp(p_i s_i^2 / t) - exp(p_j s_j^2 / t) + exp(p_j (s_j - 1)^2 / t)) for each of some items j, [T, K].

    The sum over the catalogue is made once for all of them.
    """
    own_TK, propensity_TK = scores_TN.gather(1, items_TK), propensity_N[items_TK]
    all_TN = propensity_N * scores_TN.square() / temperature
    without_TK = propensity_TK * own_TK.square() / temperature
    instead_TK = propensity_TK * (own_TK - 1).square() / temperature
    # Squares of scores overflow an exponential soon: all of them relative to the largest.
    largest_T = torch.maximum(all_TN.amax(1, keepdim=True), instead_TK.amax(1, keepdim=True)).detach()
    sum_TK = (all_TN - largest_T).exp().sum(1, keepdim=True) - (without_TK - largest_T).exp()
    floor = LOG_FLOOR * (-largest_T).exp() + torch.finfo(scores_TN.dtype).tiny
    return (sum_TK.clamp(min=0) + (instead_TK - largest_T).exp() + floor).log() + largest_T


def propensities(count_N: Tensor) -> Tensor:
    """((n_i + 1) / sum_j (n_j + 1))^0.05 of each item's training events, [N]."""
    share_N = (count_N.double() + 1) / (count_N.double() + 1).sum()
    return share_N.pow(0.05)


def ranking_loss(
    scores_TN: Tensor, lists: Lists, config: RankingConfig, robust: RobustConfig, propensity_N: Tensor
) -> Tensor:
    """What the lists teach, summed over rows and candidates."""
    own_TK = scores_TN.gather(1, lists.items_TK)
    if config.loss in ("listwise", "ranknet"):
        own_TK = own_TK / config.temperature
        if config.loss == "ranknet":
            places_K = torch.arange(1, own_TK.shape[1] + 1, device=own_TK.device)
            return weighted_ranknet(own_TK, places_K.expand(own_TK.shape)).sum()
        return listwise(own_TK, (-lists.distance_TK / config.temperature).log_softmax(1)) * config.temperature**2
    if config.loss == "dcd":
        return dual_correction(scores_TN, lists.items_TK, config.discrepancy)
    if config.loss == "rd":
        return -(discrepancy_weights(scores_TN, lists.items_TK, config) * F.logsigmoid(own_TK)).sum()
    weight_TK = importance_weights(scores_TN, lists, config).to(own_TK.dtype)
    if config.loss == "softmax":
        return (weight_TK * (scores_TN.logsumexp(1, keepdim=True) - own_TK)).sum()
    if config.loss == "paper":
        return -(weight_TK * F.logsigmoid(own_TK)).sum()
    total = beside_negative(own_TK, weight_TK, scores_TN, lists, as_published=config.loss == "published")
    if robust.weight:
        terms_TK = robust_terms(scores_TN, propensity_N, robust.temperature, lists.items_TK)
        combine = robust_as_published if config.loss == "published" else robust_per_row
        total = total + robust.weight * combine(weight_TK, terms_TK)
    return total


def beside_negative(
    own_TK: Tensor, weight_TK: Tensor, scores_TN: Tensor, lists: Lists, *, as_published: bool
) -> Tensor:
    """-w (log s(candidate) + log(1 - s(negative))), one negative for all candidates of a row.

    The published code has log s(1 - negative) in the second place.
    """
    assert lists.negative_T is not None
    negative_T1 = scores_TN.gather(1, lists.negative_T[:, None])
    against_T1 = F.softplus(negative_T1 - 1 if as_published else negative_T1)
    return (weight_TK * (F.softplus(-own_TK) + against_T1)).sum()


def robust_per_row(weight_TK: Tensor, terms_TK: Tensor) -> Tensor:
    """Each row's weights on its own terms."""
    return (weight_TK * terms_TK).sum()


def robust_as_published(weight_TK: Tensor, terms_TK: Tensor) -> Tensor:
    """The published [B, 1] * [B] is a matrix, whose mean is the product of two means: no row has weights of its own.

    The means are over the rows at hand, so it depends on how rows come together.
    """
    return (weight_TK.sum(0) * terms_TK.sum(0)).sum() / max(1, len(weight_TK))


def listwise(own_TK: Tensor, wanted_TK: Tensor) -> Tensor:
    """KL of the student's softmax over the candidates from the teacher's, whose logarithms are `wanted`."""
    return F.kl_div(own_TK.log_softmax(1), wanted_TK, reduction="sum", log_target=True)
