"""Losses over a teacher's lists: vectorised as a plain loop would have it, stable, and each what its name says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.distillation import (
    Lists,
    RankingConfig,
    RobustConfig,
    discrepancy_weights,
    importance_weights,
    propensities,
    ranking_loss,
    robust_terms,
)
from models.losses import in_chunks

ROWS, ITEMS, K = 7, 23, 4
CONFIG = RankingConfig()


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(ROWS, ITEMS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def lists() -> Lists:
    generator = torch.Generator().manual_seed(1)
    items = torch.stack([torch.randperm(ITEMS, generator=generator) for _ in range(ROWS)])
    said = torch.randn(ROWS, K, generator=generator, dtype=torch.float64).sort(descending=True).values
    distances = -said.log_softmax(1)
    return Lists(items[:, :K], distances, items[:, 1], distances[:, 1], items[:, -1])


PROPENSITY = propensities(torch.arange(ITEMS) ** 2)


def test_the_vectorised_loss_is_the_loop_over_rows_and_candidates(scores: Tensor, lists: Lists) -> None:
    robust = RobustConfig(weight=0.4, temperature=0.8)
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(ROWS):
        own = scores[b]
        best = own.argsort(descending=True)[:K].tolist()
        weights = []
        for r in range(K):
            position = torch.tensor(-(r + 1.0)).exp() / sum(torch.tensor(-(i + 1.0)).exp() for i in range(K))
            confidence = (-lists.distance_TK[b, r]).exp() / (-lists.distance_TK[b]).exp().sum()
            consistent = float(lists.items_TK[b, r] in best)
            weights.append(0.3 * position + 0.5 * confidence + 0.1 * consistent)
        assert sum(weights) > 0
        for r in range(K):
            item, negative = lists.items_TK[b, r], lists.negative_T[b]  # type: ignore[index]
            terms = PROPENSITY * own.square() / 0.8
            changed = terms.clone()
            changed[item] = PROPENSITY[item] * (own[item] - 1) ** 2 / 0.8
            dros = changed.exp().sum().log()
            bce = -own[item].sigmoid().log() - (1 - own[negative].sigmoid()).log()
            expected = expected + weights[r] / sum(weights) * (bce + 0.4 * dros)
    ours = ranking_loss(scores, lists, CONFIG, robust, PROPENSITY)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("switched", ["position", "confidence", "consistency"])
def test_each_weight_alone(scores: Tensor, lists: Lists, switched: str) -> None:
    alone = {"position": 0.0, "confidence": 0.0, "consistency": 0.0} | {switched: 0.7}
    weights = importance_weights(scores, lists, replace(CONFIG, **alone))
    torch.testing.assert_close(weights.sum(1), torch.ones(ROWS, dtype=weights.dtype))
    if switched == "position":
        assert (weights == weights[0]).all()
        assert (weights.diff(dim=1) < 0).all()
        flatter = importance_weights(scores, lists, replace(CONFIG, **alone, position_temperature=100.0))
        torch.testing.assert_close(flatter, torch.full_like(flatter, 1 / K), rtol=0.05, atol=0)
    elif switched == "confidence":
        torch.testing.assert_close(weights, (-lists.distance_TK).exp(), rtol=1e-6, atol=1e-7)
    else:
        top = scores.argsort(dim=1, descending=True)[:, :K]
        agreed = (lists.items_TK[:, :, None] == top[:, None, :]).any(2)
        assert agreed.any()
        assert (weights[agreed] > 0.2).all()
        some = agreed.any(1)
        assert (weights[some][~agreed[some]] < 1e-6).all()


@pytest.mark.parametrize("chunk_rows", [1, 3, ROWS, 100])
@pytest.mark.parametrize("loss", ["intended", "paper", "softmax", "rd", "dcd", "listwise", "ranknet"])
def test_chunks_change_no_loss_and_no_gradient(lists: Lists, loss: str, chunk_rows: int) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, table = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True) for n in (ROWS, ITEMS)
    )
    config, robust = replace(CONFIG, loss=loss), RobustConfig(weight=0.5)  # type: ignore[arg-type]

    def taught(scores: Tensor, rows: slice) -> Tensor:
        return ranking_loss(scores, lists.of(rows), config, robust, PROPENSITY)

    whole, chunked = taught(hidden @ table.T, slice(None)), in_chunks(hidden, table, taught, chunk_rows)
    torch.testing.assert_close(chunked, whole)
    for ours, expected in zip(
        torch.autograd.grad(0.3 * chunked, (hidden, table)),
        torch.autograd.grad(0.3 * whole, (hidden, table)),
        strict=True,
    ):
        assert expected.any()
        torch.testing.assert_close(ours, expected)


def test_soft_labels_on_one_item_are_cross_entropy(scores: Tensor, lists: Lists) -> None:
    sure = lists._replace(distance_TK=torch.tensor([0.0, 50, 50, 50]).expand(ROWS, K))
    config = replace(CONFIG, loss="softmax", position=0.0, consistency=0.0)
    ours = ranking_loss(scores, sure, config, RobustConfig(), PROPENSITY)
    expected = F.cross_entropy(scores, lists.items_TK[:, 0], reduction="sum")
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_ranking_distillation_weighs_what_the_student_ranks_too_low(scores: Tensor, lists: Lists) -> None:
    order = scores.argsort(dim=1, descending=True)
    agreed = discrepancy_weights(scores, order[:, :K], CONFIG)
    assert not agreed.any()
    swapped = order[:, [ITEMS - 1, 1, 2, 3]]  # its first candidate is the student's last
    assert (discrepancy_weights(scores, swapped, CONFIG) == torch.tensor([1.0, 0, 0, 0])).all()
    weights = discrepancy_weights(scores, lists.items_TK, replace(CONFIG, discrepancy=0.1))
    rank = 1 + (scores[:, None, :] > scores.gather(1, lists.items_TK)[:, :, None]).sum(2)
    expected = (0.1 * (rank - torch.arange(1, K + 1))).clamp(min=0).tanh() * (-torch.arange(1.0, K + 1)).exp()
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("steepness", [0.05, 1.0])
def test_dual_correction_by_its_formula(scores: Tensor, lists: Lists, steepness: float) -> None:
    config = replace(CONFIG, loss="dcd", discrepancy=steepness)
    expected = torch.zeros((), dtype=scores.dtype)
    for own, listed in zip(scores, lists.items_TK.tolist(), strict=True):
        rank = {int(item): place for place, item in enumerate(own.argsort(descending=True), 1)}
        low = [np.tanh(max(0, steepness * (rank[item] - place))) for place, item in enumerate(listed, 1)]
        strange = [item for item in rank if rank[item] <= K and item not in listed]
        high = sum(np.tanh(steepness * (K + 1 - rank[item])) * own[item].exp() for item in strange)
        for place, item in enumerate(listed):
            rivals = sum(low[i] * own[listed[i]].exp() for i in range(place, K)) + high
            if low[place]:
                expected += low[place] * (rivals.log() - own[item])
    assert expected > 0
    torch.testing.assert_close(
        ranking_loss(scores, lists, config, RobustConfig(), PROPENSITY), expected, rtol=1e-5, atol=0
    )
    agreed = lists._replace(items_TK=scores.argsort(dim=1, descending=True)[:, :K])
    assert ranking_loss(scores, agreed, config, RobustConfig(), PROPENSITY) == 0


def test_listwise_is_smallest_where_both_agree(scores: Tensor, lists: Lists) -> None:
    config = replace(CONFIG, loss="listwise", temperature=2.0)

    def loss(own: Tensor) -> Tensor:
        return ranking_loss(own, lists, config, RobustConfig(), PROPENSITY)

    agreeing = scores.scatter(1, lists.items_TK, 3 - lists.distance_TK)
    assert loss(agreeing).abs() < 1e-12
    wanted = (-lists.distance_TK / 2).softmax(1)
    own = (scores.gather(1, lists.items_TK) / 2).softmax(1)
    torch.testing.assert_close(loss(scores), 4 * (wanted * (wanted / own).log()).sum())


def test_pairs_of_a_list_are_weighted_by_their_places(scores: Tensor, lists: Lists) -> None:
    config = replace(CONFIG, loss="ranknet", temperature=2.0)
    own = scores.gather(1, lists.items_TK) / 2
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    terms = [F.softplus(own[:, j] - own[:, i]) / (i + j + 2) for i, j in pairs]
    expected = torch.stack(terms).sum() / len(pairs)
    torch.testing.assert_close(ranking_loss(scores, lists, config, RobustConfig(), PROPENSITY), expected)


def test_the_robust_term_of_large_scores_is_finite(scores: Tensor, lists: Lists) -> None:
    large = (40 * scores).float().requires_grad_()  # their squares overflow exp in float32, and in float64 nearly
    terms = robust_terms(large, PROPENSITY.float(), 1.0, lists.items_TK)
    exact = robust_terms(large.detach().double(), PROPENSITY, 1.0, lists.items_TK)
    assert terms.isfinite().all()
    torch.testing.assert_close(terms.double(), exact, rtol=1e-4, atol=0)
    terms.sum().backward()
    assert large.grad is not None
    assert large.grad.isfinite().all()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--method\.ranking\.position"):
        RankingConfig(position=0, confidence=0, consistency=0)
    RankingConfig(loss="rd", position=0, confidence=0, consistency=0)
    with pytest.raises(ValueError, match=r"--method\.ranking\.confidence -0\.1"):
        RankingConfig(confidence=-0.1)
    with pytest.raises(ValueError, match=r"--method\.ranking\.position_temperature 0"):
        RankingConfig(position_temperature=0)
    with pytest.raises(ValueError, match=r"--method\.robust\.temperature 0"):
        RobustConfig(temperature=0)
