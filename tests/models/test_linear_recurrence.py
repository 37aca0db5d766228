"""The parallel scan is the recurrence, for every length, forwards and backwards."""

import pytest
import torch
from torch import Tensor

from models.linear_recurrence import linear_recurrence

LENGTHS = [*range(1, 20), 30, 37, 200]


def one_by_one(inputs: Tensor, decay: Tensor) -> Tensor:
    state, states = torch.zeros_like(inputs[:, 0]), []
    for t in range(inputs.shape[1]):
        state = decay * state + inputs[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def drawn(length: int, dtype: torch.dtype = torch.complex128) -> tuple[Tensor, Tensor]:
    """Inputs [3, length, 4], and decays of which some hardly shrink and some forget at once."""
    torch.manual_seed(length)
    decay = torch.polar(torch.tensor([0.9999, 0.9, 0.3, 1e-30]).double(), torch.tensor([6.28, 3, 0.1, 1]).double())
    return torch.randn(3, length, 4, dtype=dtype), decay.to(dtype)


@pytest.mark.parametrize("length", LENGTHS)
def test_states_and_gradients_are_those_of_one_step_after_the_other(length: int) -> None:
    inputs, decay = (tensor.requires_grad_() for tensor in drawn(length))
    weights = torch.randn(3, length, 4, dtype=torch.complex128)
    expected = one_by_one(inputs, decay)
    torch.testing.assert_close(linear_recurrence(inputs, decay), expected)
    losses = [(states * weights).sum().abs() for states in (linear_recurrence(inputs, decay), expected)]
    ours, theirs = (torch.autograd.grad(loss, (inputs, decay)) for loss in losses)
    torch.testing.assert_close(ours, theirs)


def test_inputs_are_left_as_they_are() -> None:
    inputs, decay = drawn(9)
    before = inputs.clone()
    linear_recurrence(inputs, decay)
    assert torch.equal(inputs, before)
    linear_recurrence(inputs.transpose(0, 1).contiguous().transpose(0, 1), decay)  # neither need they be contiguous


def test_thousands_of_steps_stay_finite_in_float32() -> None:
    """Dividing by powers of what shrinks would overflow."""
    inputs, decay = drawn(5000, torch.complex64)
    states = linear_recurrence(inputs, decay)
    exact = one_by_one(inputs.to(torch.complex128), decay.to(torch.complex128))
    assert (states - exact).abs().max() < 1e-4 * exact.abs().max()


def test_a_state_never_changes_with_what_comes_later() -> None:
    inputs, decay = drawn(37, torch.complex64)
    whole = linear_recurrence(inputs, decay)
    changed = inputs.clone()
    changed[:, 20:] = 1e6
    assert torch.equal(linear_recurrence(changed, decay)[:, :20], whole[:, :20])
