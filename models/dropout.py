"""Dropout whose mask is quick to draw on a CPU: torch draws one number an element there, in one thread."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Return which elements stay, a bool of the shape of `values`, and the part that stays on average: about 1 - p."""
    if not _draws(values, p):
        return torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - p), 1 - p
    cut = round(p * LEVELS)
    return (_levels(values) >= cut - LEVELS // 2).view(values.shape), 1 - cut / LEVELS


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


def quicken(model: nn.Module) -> None:
    """Replace the dropout inside a model from elsewhere."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                module.add_module(name, Dropout(child.p))
