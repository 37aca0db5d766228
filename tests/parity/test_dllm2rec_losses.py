"""DLLM2Rec's losses, weights and embedding distillation against its code: values and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models import losses
from models.distillation import (
    Lists,
    RankingConfig,
    RobustConfig,
    beside_negative,
    confidence_weights,
    importance_weights,
    in_students_top,
    position_weights,
    propensities,
    ranking_loss,
    robust_as_published,
    robust_per_row,
    robust_terms,
)

from .tolerance import assert_near

TOLERANCE = 2e-6  # the importance weights inside the reference stay float32
KEYS = [f"alpha{alpha}.beta{beta}" for alpha, beta in ((0.0, 1.0), (0.5, 1.0), (0.5, 0.7), (1.0, 1.0))]


class Inputs:
    def __init__(self, golden) -> None:
        self.meta, self.tensors = golden("dllm2rec_losses")
        tensors, k = self.tensors, self.meta["sizes"]["K"]
        self.scores = tensors["student_scores"].double().requires_grad_()
        self.lists = Lists(
            tensors["teacher_topk"][:, :k],
            tensors["teacher_dist"][:, :k],
            tensors["target"],
            tensors["teacher_target_dist"],
            tensors["negative"],
        )
        self.propensity = propensities(tensors["train_count"])
        hyper = self.meta["hyper"]
        self.config = RankingConfig(
            weight=hyper["lam"],
            position=hyper["gamma_position"],
            confidence=hyper["gamma_confidence"],
            consistency=hyper["gamma_consistency"],
            position_temperature=hyper["position_lambda"],
        )

    def base(self, robust: RobustConfig) -> Tensor:
        """The mean of the students' own loss: BCE with one negative, and the robust term of the target."""
        positive, negative = (self.scores.gather(1, self.tensors[name][:, None]) for name in ("target", "negative"))
        total = losses.binary_cross_entropy(positive.squeeze(1), negative)
        if robust.weight:
            own = self.lists.target_T[:, None]
            total = total + robust.weight * robust_terms(self.scores, self.propensity, robust.temperature, own).sum()
        return total / len(self.scores)

    def check(self, variant: str, key: str, base: Tensor, ranking: Tensor) -> None:
        values, total = self.meta["values"][f"{variant}.{key}"], base + self.config.weight * ranking
        for name, ours in (("base", base), ("rd", ranking), ("total", total)):
            assert_near(ours, torch.tensor(values[f"loss_{name}"]), TOLERANCE, name)
            (gradient,) = torch.autograd.grad(ours, self.scores, retain_graph=True)
            assert_near(gradient, self.tensors[f"grad_{name}.{variant}.{key}"], TOLERANCE, name)


@pytest.fixture
def inputs(golden) -> Inputs:
    return Inputs(golden)


def robust_of(key: str) -> RobustConfig:
    alpha, beta = (float(part.lstrip("alphbet")) for part in key.split(".beta"))
    return RobustConfig(alpha, beta)


def test_weights(inputs: Inputs) -> None:
    tensors, lists, config = inputs.tensors, inputs.lists, inputs.config
    k = lists.items_TK.shape[1]
    assert_near(
        position_weights(k, config.position_temperature).expand(len(lists.items_TK), k), tensors["w_position"], 1e-6
    )
    assert_near(confidence_weights(lists.distance_TK), tensors["w_confidence"], 1e-6)
    assert_near(in_students_top(inputs.scores, lists.items_TK) + 1e-8, tensors["w_consistency"], 1e-6)
    ours = importance_weights(inputs.scores, lists, config)
    assert_near(ours, tensors["w_final"], 1e-6)
    assert torch.allclose(ours.sum(1), torch.ones(len(ours)))
    assert not ours.requires_grad


def test_the_robust_term(inputs: Inputs) -> None:
    assert_near(inputs.propensity, inputs.tensors["propensity"], 1e-12)
    ours = robust_terms(inputs.scores, inputs.propensity, 1.0, inputs.lists.target_T[:, None])
    assert_near(ours.squeeze(1), inputs.tensors["dros_per_row"], 1e-12)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("loss", "variant"), [("intended", "intended"), ("published", "as_coded")])
def test_ranking_distillation(inputs: Inputs, loss: str, variant: str, key: str) -> None:
    robust = robust_of(key)
    config = replace(inputs.config, loss=loss)
    ranking = ranking_loss(inputs.scores, inputs.lists, config, robust, inputs.propensity) / len(inputs.scores)
    inputs.check(variant, key, inputs.base(robust), ranking)


@pytest.mark.parametrize("key", KEYS)
def test_the_published_loss_with_weights_that_act_on_their_own_row(inputs: Inputs, key: str) -> None:
    """One of the two slips alone: the published negative, and each row's weights on its own robust terms."""
    robust, lists = robust_of(key), inputs.lists
    weight = importance_weights(inputs.scores, lists, inputs.config)
    own = inputs.scores.gather(1, lists.items_TK)
    total = beside_negative(own, weight, inputs.scores, lists, as_published=True)
    if robust.weight:
        terms = robust_terms(inputs.scores, inputs.propensity, robust.temperature, lists.items_TK)
        total = total + robust.weight * robust_per_row(weight, terms)
        assert not torch.isclose(robust_per_row(weight, terms), robust_as_published(weight, terms))
    inputs.check("broadcast_fixed", key, inputs.base(robust), total / len(inputs.scores))


def test_the_loss_of_the_papers_text(inputs: Inputs) -> None:
    config = replace(inputs.config, loss="paper")
    assert_near(importance_weights(inputs.scores, inputs.lists, config), inputs.tensors["paper_w"], 1e-6)
    loss = ranking_loss(inputs.scores, inputs.lists, config, RobustConfig(), inputs.propensity) / len(inputs.scores)
    assert_near(loss, torch.tensor(inputs.meta["values"]["paper_reading"]["loss_rd"]), TOLERANCE)
    (gradient,) = torch.autograd.grad(loss, inputs.scores)
    assert_near(gradient, inputs.tensors["paper_grad_rd"], TOLERANCE)
