"""Losses of UR4Rec V2's parts, and how they are balanced."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def part_loss(
    scores_RC: Tensor, target_R: Tensor, masked_RC: Tensor, is_label_R: Tensor, kind: Literal["softmax", "bce", "bpr"]
) -> Tensor:
    """Sum over labelled rows of the loss of candidate `target`; masked candidates other than it do not count.

    softmax: cross-entropy. bce: the mean of binary cross-entropies over a row's candidates. bpr: the mean over
    negatives of -log sigmoid(positive - negative) (Rendle et al., UAI 2009).
    """
    is_target = F.one_hot(target_R, scores_RC.shape[1]).bool()
    kept = is_target | ~masked_RC
    scores = scores_RC.float()
    if kind == "softmax":
        loss = F.cross_entropy(scores.masked_fill(~kept, -torch.inf), target_R, reduction="none")
    elif kind == "bce":
        each = F.binary_cross_entropy_with_logits(scores, is_target.float(), reduction="none")
        loss = (each * kept).sum(1) / kept.sum(1)
    else:
        negative = kept & ~is_target
        each = F.softplus(scores - scores.gather(1, target_R[:, None]))
        loss = (each * negative).sum(1) / negative.sum(1).clamp(min=1)
    return (loss * is_label_R).sum()


class Uncertainty(nn.Module):
    """sum of exp(-g) L + g over the terms, g learned for each from 0 on (Kendall et al., CVPR 2018)."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.log_variance = nn.Parameter(torch.zeros(len(names)))

    def forward(self, terms: Mapping[str, Tensor], count: int) -> Tensor:
        """Return the balanced sum; terms are sums over `count` labels."""
        each = torch.stack([terms[name] for name in self.names])
        return ((-self.log_variance).exp() * each + self.log_variance * count).sum()
