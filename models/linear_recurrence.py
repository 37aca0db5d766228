"""A diagonal linear recurrence over complex channels, all positions in parallel."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _LinearRecurrence(torch.autograd.Function):
    """Keeps the states for the backward pass and nothing else: the gradient is the same recurrence from the end."""

    @staticmethod
    def forward(ctx: Any, inputs_BLC: Tensor, decay_C: Tensor) -> Tensor:
        states_BLC = scan_(inputs_BLC.clone(memory_format=torch.contiguous_format), decay_C)
        ctx.save_for_backward(states_BLC, decay_C)
        return states_BLC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLC: Tensor) -> tuple[Tensor, Tensor]:
        states_BLC, decay_C = ctx.saved_tensors
        grad_BLC = grad_BLC.clone(memory_format=torch.contiguous_format)
        scan_(grad_BLC, decay_C.conj().resolve_conj(), backwards=True)
        grad_decay_C = states_BLC[:, :-1].conj_physical().mul_(grad_BLC[:, 1:]).sum((0, 1))
        return grad_BLC, grad_decay_C


def linear_recurrence(inputs_BLC: Tensor, decay_C: Tensor) -> Tensor:
    """Return h_t = decay * h_{t-1} + input_t for every t, [B, L, C] complex; h is 0 before the first position."""
    return _LinearRecurrence.apply(inputs_BLC, decay_C)


def scan_(states_BLC: Tensor, decay_C: Tensor, backwards: bool = False) -> Tensor:
    """Turn the inputs of the recurrence into its states, in place, in about 2 sqrt(L) steps.

    The positions are cut into blocks of sqrt(L). First all blocks advance together, each as if it were alone; then each
    hands its last state on to the next. Only powers of `decay` are multiplied, which cannot overflow where it shrinks.
    """
    rows, length, channels = states_BLC.shape
    size, order = math.isqrt(length - 1) + 1, -1 if backwards else 1
    blocks, rest = states_BLC.split([length // size * size, length % size], dim=1)
    for slots in (blocks.view(rows, length // size, size, channels).unbind(2), rest.unbind(1)):
        for before, now in pairwise(slots[::order]):
            now.addcmul_(before, decay_C)
    powers_SC = decay_C.expand(size, channels).cumprod(0)
    for before, now in pairwise(states_BLC.split(size, dim=1)[::order]):
        if backwards:
            now.addcmul_(before[:, :1], powers_SC.flip(0))
        else:
            now.addcmul_(before[:, -1:], powers_SC[: now.shape[1]])
    return states_BLC
