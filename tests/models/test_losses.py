"""Catalogue losses: the chunked cross-entropy is torch's, in value and gradient, without its memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.losses import (
    binary_cross_entropy,
    full_cross_entropy,
    gbce,
    gbce_beta,
    kl_divergence,
    sampled_cross_entropy,
)

ROWS, WIDTH, CLASSES = 37, 8, 53


def problem(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    table = torch.randn(CLASSES, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, table, torch.randint(CLASSES, (rows,), generator=generator)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    # A factor other than one: the backward pass must use what flows into it.
    return torch.autograd.grad(0.37 * loss, inputs)


@pytest.mark.parametrize("chunk_rows", [1, 5, ROWS - 1, ROWS, 1000])
def test_chunked_cross_entropy_is_torchs(chunk_rows: int) -> None:
    hidden, table, target = problem()
    ours = full_cross_entropy(hidden, table, target, chunk_rows)
    theirs = F.cross_entropy(hidden @ table.T, target, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for own, reference in zip(gradients(ours, hidden, table), gradients(theirs, hidden, table), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_rows", [1, 5, ROWS, 1000])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_chunked_kl_divergence_is_torchs(chunk_rows: int, temperature: float) -> None:
    hidden, table, _ = problem()
    teacher, items = torch.randn(ROWS, 5, dtype=torch.float64), torch.randn(CLASSES, 5, dtype=torch.float64)
    teacher.requires_grad_()
    ours = kl_divergence(hidden, table, teacher, items, temperature, chunk_rows)
    wanted, found = (teacher @ items.T / temperature).detach(), hidden @ table.T / temperature
    theirs = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="sum", log_target=True) * temperature**2
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for own, reference in zip(gradients(ours, hidden, table), gradients(theirs, hidden, table), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-11, atol=1e-13)
    assert not torch.autograd.grad(ours, [teacher], allow_unused=True)[0]


def test_equal_distributions_do_not_diverge() -> None:
    hidden, table, _ = problem()
    loss = kl_divergence(hidden, table, hidden, table)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients(loss, hidden, table))


def test_large_logits_do_not_overflow() -> None:
    hidden, table, target = problem()
    ours = full_cross_entropy(hidden * 1e3, table, target)
    torch.testing.assert_close(ours, F.cross_entropy(hidden * 1e3 @ table.T, target, reduction="sum"))
    assert all(gradient.isfinite().all() for gradient in gradients(ours, hidden, table))


def test_no_rows_give_a_loss_of_zero_and_zero_gradients() -> None:
    hidden, table, target = problem(rows=0)
    loss = full_cross_entropy(hidden, table, target)
    assert loss == 0
    hidden_gradient, table_gradient = gradients(loss, hidden, table)
    assert hidden_gradient.shape == hidden.shape
    assert not table_gradient.any()


@pytest.mark.parametrize("frozen", ["hidden", "table", "both"])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    hidden, table, target = problem()
    theirs = gradients(F.cross_entropy(hidden @ table.T, target, reduction="sum"), hidden, table)
    free = {"hidden": [1], "table": [0], "both": []}[frozen]
    inputs = [tensor if i in free else tensor.detach() for i, tensor in enumerate((hidden, table))]
    loss = full_cross_entropy(*inputs, target, chunk_rows=10)
    assert loss.requires_grad == bool(free)
    if free:
        torch.testing.assert_close(gradients(loss, inputs[free[0]])[0], theirs[free[0]])


class _LargestTensor(TorchDispatchMode):
    """Notes the most entries that any tensor has that is made inside the block."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.entries = max(self.entries, result.numel())
        return result


def test_logits_exist_one_chunk_at_a_time() -> None:
    hidden, table, target = problem(rows=400)
    with _LargestTensor() as whole:
        F.cross_entropy(hidden @ table.T, target, reduction="sum").backward()
    with _LargestTensor() as chunked:
        full_cross_entropy(hidden, table, target, chunk_rows=10).backward()
    assert whole.entries == 400 * CLASSES
    assert chunked.entries <= max(hidden.numel(), table.numel(), 10 * CLASSES)


def test_bfloat16_autocast_costs_little_precision() -> None:
    hidden, table, target = problem(rows=256, dtype=torch.float32)
    exact = F.cross_entropy(hidden @ table.T, target, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_cross_entropy(hidden, table, target, chunk_rows=100)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    for own, reference in zip(gradients(loss, hidden, table), gradients(exact, hidden, table), strict=True):
        assert own.dtype == torch.float32
        assert (own - reference).norm() < 0.01 * reference.norm()


def test_a_sum_over_many_bfloat16_chunks_does_not_drift() -> None:
    """Sums run in float32: in bfloat16, 8 bits, a total stops growing once it is 256 times a chunk."""
    hidden, table, target = problem(rows=2048, dtype=torch.bfloat16)
    exact = F.cross_entropy(hidden.double() @ table.double().T, target, reduction="sum")
    loss = full_cross_entropy(hidden, table, target, chunk_rows=1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    reference = gradients(exact, hidden, table)[1]
    assert (gradients(loss, hidden, table)[1] - reference).norm() < 0.01 * reference.norm()


def test_gbce_beta() -> None:
    assert gbce_beta(256, 3416, 0.75) == pytest.approx(0.3062, abs=5e-5)  # the figure of the gSASRec recipe
    assert gbce_beta(10, 11, 0.5) == 1.0  # all other items are negatives: nothing to correct


def test_losses_with_negatives_are_sums_over_rows() -> None:
    """The training loop divides by the number of labels, so two halves must add up to the whole."""
    rows = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for loss in (binary_cross_entropy, sampled_cross_entropy, lambda p, n: gbce(p, n, 0.4)):
        halves = [loss(half[:, 0], half[:, 1:]) for half in rows.split(5)]
        assert loss(rows[:, 0], rows[:, 1:]).item() == pytest.approx(sum(halves).item(), rel=1e-12)
        assert loss(rows[:0, 0], rows[:0, 1:]) == 0


def test_a_negative_that_is_the_positive_leaves_the_sampled_softmax() -> None:
    positive, negative = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.5], [2.0, 2.0]])
    hits = torch.tensor([[True, False], [True, True]])
    expected = F.softplus(torch.tensor(0.5 - 1.0))  # the second row has no negative left: its loss is 0
    torch.testing.assert_close(sampled_cross_entropy(positive, negative, hits), expected)
