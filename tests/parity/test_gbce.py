"""gBCE, BCE and sampled softmax against gSASRec-pytorch, RecTools and transformer_benchmark: values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.losses import binary_cross_entropy, gbce, gbce_beta, sampled_cross_entropy

# Stored figures are float32-rounded: an error is relative to the largest entry of its tensor.
TOLERANCE = 1e-6
# Outside this range the published gBCE clamps its probabilities, and says that the closed form differs there.
UNCLAMPED = 15

Rows = Callable[[Tensor], Tensor]  # logits [T, K + 1] of the real positions -> summed loss


@pytest.fixture
def vectors(golden):
    return golden("gbce")


def mean_and_gradient(logits: Tensor, mask: Tensor, loss: Rows) -> tuple[Tensor, Tensor]:
    """The mean over real positions in float64, and its gradient with respect to all logits."""
    logits = logits.double().requires_grad_()
    real = mask.bool()
    mean = loss(logits[real]) / real.sum()
    mean.backward()
    assert logits.grad is not None
    return mean.detach(), logits.grad


def assert_near(ours: Tensor, stored: Tensor | float) -> None:
    stored = torch.as_tensor(stored, dtype=torch.float64)
    assert (ours - stored).abs().max() < TOLERANCE * stored.abs().max()


def test_bce(vectors) -> None:
    meta, tensors = vectors
    mean, gradient = mean_and_gradient(
        tensors["logits"], tensors["mask"], lambda rows: binary_cross_entropy(rows[:, 0], rows[:, 1:])
    )
    assert_near(mean, meta["bce"])
    assert_near(gradient, tensors["bce.grad"])


def test_gbce(vectors) -> None:
    meta, tensors = vectors
    logits, mask = tensors["logits"], tensors["mask"]
    sizes = meta["sizes"]
    unclamped = mask.bool() & (logits[..., 0].abs() < UNCLAMPED)
    assert unclamped.any()
    for t, stored in meta["gbce"].items():
        beta = gbce_beta(sizes["negatives"], sizes["items"], float(t))
        assert beta == pytest.approx(stored["beta"], abs=1e-12)

        # l = (sp(-z) + sum sp(negatives)) / (K + 1), z being their transformed positive logit.
        sp = torch.nn.functional.softplus
        z = tensors[f"gbce.positive_logits_transformed.t{t}"]
        theirs = (sp(-z) + sp(logits[..., 1:].double()).sum(-1)) / (sizes["negatives"] + 1)
        assert_near((theirs * mask).sum() / mask.sum(), stored["loss"])

        total = gbce(logits[unclamped][:, 0].double(), logits[unclamped][:, 1:].double(), beta)
        assert_near(total, theirs[unclamped].sum())

        _, gradient = mean_and_gradient(logits, mask, lambda rows, beta=beta: gbce(rows[:, 0], rows[:, 1:], beta))
        stored_gradient = tensors[f"gbce.grad.t{t}"].double()
        assert_near(gradient[..., 1:], stored_gradient[..., 1:])
        assert_near(gradient[..., 0].where(unclamped, 0), stored_gradient[..., 0].where(unclamped, 0))


def test_t_moves_gbce_from_bce_to_calibration(vectors) -> None:
    meta, tensors = vectors
    sizes, rows = meta["sizes"], tensors["logits"].flatten(0, 1).double()
    positive, negative = rows[:, 0], rows[:, 1:]
    bce = binary_cross_entropy(positive, negative)
    assert torch.equal(gbce(positive, negative, gbce_beta(sizes["negatives"], sizes["items"], 0.0)), bce)
    calibrated = gbce_beta(sizes["negatives"], sizes["items"], 1.0)
    assert calibrated == pytest.approx(sizes["negatives"] / (sizes["items"] - 1))


def test_sampled_softmax(vectors) -> None:
    meta, tensors = vectors
    mask, real = tensors["mask"], tensors["mask"].bool()
    positives, negatives = tensors["positives"][real], tensors["negatives"][real]
    counts = tensors["item_counts"].double()
    log_q = torch.cat([torch.zeros(1, dtype=torch.float64), (counts / counts.sum()).log()])  # by item id
    hits = negatives == positives[:, None]
    assert hits.any()
    negatives_only = {"log_q_TK": log_q[negatives]}
    everything = negatives_only | {"log_q_positive_T": log_q[positives]}
    variants: dict[str, dict[str, Tensor]] = {
        "plain": {},
        "logq_all": everything,
        "logq_negatives_only": negatives_only,
        "logq_all_mask_hits": everything | {"hits_TK": hits},
        "logq_negatives_only_mask_hits": negatives_only | {"hits_TK": hits},
    }
    assert meta["sampled_softmax"].keys() == {*variants, "plain_weighted"}
    for name, options in variants.items():
        mean, gradient = mean_and_gradient(
            tensors["ss_logits"],
            mask,
            lambda rows, options=options: sampled_cross_entropy(rows[:, 0], rows[:, 1:], **options),
        )
        assert_near(mean, meta["sampled_softmax"][name])
        assert_near(gradient, tensors[f"ss.{name}.grad"])


def test_weighted_sampled_softmax(vectors) -> None:
    """Weights multiply each position's loss, and the divisor stays the number of positions."""
    meta, tensors = vectors
    weights = tensors["ss_weights"][tensors["mask"].bool()].double()

    def weighted(rows: Tensor) -> Tensor:
        losses = [sampled_cross_entropy(row[None, 0], row[None, 1:]) for row in rows]
        return (weights * torch.stack(losses)).sum()

    mean, gradient = mean_and_gradient(tensors["ss_logits"], tensors["mask"], weighted)
    assert_near(mean, meta["sampled_softmax"]["plain_weighted"])
    assert_near(gradient, tensors["ss.plain_weighted.grad"])
