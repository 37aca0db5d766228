"""Dropout whose mask is quick to draw on a CPU: torch draws one number an element there, in one thread."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

QUICK = frozenset({"cpu"})  # devices on which masks are drawn here
LEVELS = 2**16  # of a 16-bit number


def dropout(values: Tensor, p: float, training: bool = True) -> Tensor:
    """Do what F.dropout does.

    A drawn 64-bit number decides for four elements, so p is rounded to a multiple of 2^-16; what is kept is divided by
    the part that really is, and expectations are exact.
    """
    if not training or not _draws(values, p):
        return F.dropout(values, p, training)
    cut = round(p * LEVELS)
    factors = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
    torch.ge(_levels(values), cut - LEVELS // 2, out=factors)
    return values * factors.mul_(LEVELS / (LEVELS - cut)).view(values.shape)


def keep_mask(values: Tensor, p: float) -> tuple[Tensor, float]:
    """Return which elements stay, 1 or 0 in the shape of `values`, and the part that stays on average: about 1 - p.

    In int8, whose product with other types a CPU computes three times as fast as that of bool.
    """
    if not _draws(values, p):
        return torch.empty_like(values, dtype=torch.int8).bernoulli_(1 - p), 1 - p
    cut = round(p * LEVELS)
    keep = _levels(values).ge_(cut - LEVELS // 2).to(torch.int8)
    return keep.view(values.shape), 1 - cut / LEVELS


def dropped(values: Tensor, keep: Tensor) -> Tensor:
    """Return the product with a mask of `keep_mask`, out of autograd's sight."""
    return keep.to(values.dtype).mul_(values)  # a CPU casts the mask as a whole anyway


def _draws(values: Tensor, p: float) -> bool:
    return values.device.type in QUICK and 0 < round(p * LEVELS) < LEVELS


def _levels(values: Tensor) -> Tensor:
    """Return a random 16-bit number for each element, flat."""
    drawn = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device).random_(-(2**63), None)
    return drawn.view(torch.int16)[: values.numel()]


class Dropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


class LinearOfDropped(nn.Linear):
    """Dropout and the linear layer behind it, with that layer's weight.

    Autograd by itself would keep the dropped input; this keeps the input, which layers share, and a byte of mask for
    each of its numbers.
    """

    def __init__(self, linear: nn.Linear, p: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.p = linear.weight, p

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        if not self.training:
            return F.linear(input.to(dtype), self.weight.to(dtype))
        keep, share = keep_mask(input, self.p)
        return _LinearOfDropped.apply(input, self.weight, keep, 1 / share, dtype)


class _LinearOfDropped(torch.autograd.Function):
    """scale * W (x * keep), computed in `dtype`; x is kept as it came, since the layers that share it do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, keep: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight_OI, keep)
        ctx.scale, ctx.dtype = scale, dtype
        return F.linear(dropped(x.to(dtype), keep), weight_OI.to(dtype)) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, keep = ctx.saved_tensors
        grad = grad.to(ctx.dtype) * ctx.scale
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = dropped(grad @ weight_OI.to(ctx.dtype), keep).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows_x = dropped(x.to(ctx.dtype), keep).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).T @ rows_x).to(weight_OI.dtype)
        return grad_x, grad_weight, None, None, None


def quicken(model: nn.Module) -> None:
    """Replace the dropout inside a model from elsewhere."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                module.add_module(name, Dropout(child.p))
