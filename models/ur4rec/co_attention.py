"""Co-attention of UR4Rec V2: a user's text and an item's, compared sentence by sentence.

R rows, P sentences of a user's text, n candidates, Q sentences of an item's text, D width.
"""

import torch
from torch import Tensor, nn

from .v2_config import UR4RecV2Config

NOT_THERE = -1e4  # affinity of a sentence that a text does not have


class CoAttention(nn.Module):
    """How well preference and description fit, [R, n]: each sentence of either attends to those of the other.

    By affinities s W d / temperature (as in Lu et al., NeurIPS 2016, there of words and image regions) every sentence
    finds a mean of the other side's. A side's fit is the mean of its sentences' products with what they have found.
    """

    def __init__(self, config: UR4RecV2Config) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.affinity = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.eye_(self.affinity.weight)
        self.weight = nn.Parameter(torch.ones(1))  # beside the retriever's own similarity

    def forward(self, preference_RPD: Tensor, real_RP: Tensor, sentences: Tensor) -> Tensor:
        """`sentences` are those of the items' texts, [R or 1, n, Q * D], zeros where a text has fewer."""
        slots = (preference_RPD * real_RP[..., None]).float()
        # The few sentences of an item stand before the many items: sums and softmaxes over short rows would be slow.
        described = sentences.float().unflatten(-1, (-1, slots.shape[-1])).transpose(1, 2)  # [R or 1, Q, n, D]
        there = (described != 0).any(-1)[:, None]  # [R or 1, 1, Q, n]
        product = products(slots, described)
        affinity = products(self.affinity(slots), described) / self.temperature
        of_preference = affinity.masked_fill(~real_RP[:, :, None, None], NOT_THERE).softmax(1)
        of_description = affinity.masked_fill(~there, NOT_THERE).softmax(2)
        by_description = (of_preference * product).sum((1, 2)) / there.sum((1, 2)).clamp(min=1)
        by_preference = (of_description * product).sum((1, 2)) / real_RP.sum(1)[:, None].clamp(min=1)
        return self.weight * (by_description + by_preference) / 2


def products(slots_RPD: Tensor, described: Tensor) -> Tensor:
    """Return [R, P, Q, n]; `described` is [R, Q, n, D], or [1, Q, n, D] where all rows have the same."""
    flat = described.flatten(1, 2).transpose(1, 2)
    return (slots_RPD @ (flat[0] if len(flat) == 1 else flat)).unflatten(-1, described.shape[1:3])
