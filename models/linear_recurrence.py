"""A diagonal linear recurrence over complex channels, all positions in parallel."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LinearRecurrence(torch.autograd.Function):
    """Keeps the states for the backward pass and nothing else: the gradient is the same recurrence, run backwards."""

    @staticmethod
    def forward(ctx: Any, inputs_BLC: Tensor, decay_C: Tensor) -> Tensor:
        states_BLC = scan_(inputs_BLC.clone(memory_format=torch.contiguous_format), decay_C)
        ctx.save_for_backward(states_BLC, decay_C)
        return states_BLC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLC: Tensor) -> tuple[Tensor, Tensor]:
        states_BLC, decay_C = ctx.saved_tensors
        grad_BLC = scan_(grad_BLC.flip(1), decay_C.conj()).flip(1)
        grad_decay_C = (grad_BLC[:, 1:] * states_BLC[:, :-1].conj()).sum((0, 1))
        return grad_BLC, grad_decay_C


def linear_recurrence(inputs_BLC: Tensor, decay_C: Tensor) -> Tensor:
    """Return h_t = decay * h_{t-1} + input_t for every t, [B, L, C] complex; h is 0 before the first position."""
    return _LinearRecurrence.apply(inputs_BLC, decay_C)


def scan_(states_BLC: Tensor, decay_C: Tensor) -> Tensor:
    """Turn the inputs of the recurrence into its states, in place, in about 2 sqrt(L) steps.

    The positions are cut into blocks of sqrt(L). First all blocks advance together, each as if it were alone; then each
    hands its last state on to the next. Only powers of `decay` are multiplied, which cannot overflow where it shrinks.
    """
    rows, length, channels = states_BLC.shape
    size = math.isqrt(max(0, length - 1)) + 1
    count = length // size
    blocks, rest = states_BLC[:, : count * size].view(rows, count, size, channels), states_BLC[:, count * size :]
    for i in range(1, size):
        blocks[:, :, i].addcmul_(blocks[:, :, i - 1], decay_C)
    for i in range(1, rest.shape[1]):
        rest[:, i].addcmul_(rest[:, i - 1], decay_C)
    powers = decay_C.expand(size, channels).cumprod(0)
    for block in range(1, count):
        blocks[:, block].addcmul_(blocks[:, block - 1, -1:], powers)
    if count:
        rest.addcmul_(blocks[:, -1, -1:], powers[: rest.shape[1]])
    return states_BLC
