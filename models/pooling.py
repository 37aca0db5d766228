"""One vector a text from the states of its tokens, wherever its padding stands."""

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "weighted-mean", "last", "cls"]


def pool(states_BLH: Tensor, mask_BL: Tensor, pooling: Pooling) -> Tensor:
    """Return the pooled states of the tokens under the mask, [B, H] in float32 or better.

    mean; weighted-mean: the n tokens weigh 1, 2 .. n, so that later ones, which have read more, count more
    (LLM2Vec, arXiv 2404.05961); last and cls: the last and the first token. Every row has a token under the mask.
    """
    if pooling in ("last", "cls"):
        # argmax finds the first one; the last one is the first from behind
        slot_B = mask_BL.argmax(1) if pooling == "cls" else mask_BL.shape[1] - 1 - mask_BL.flip(1).argmax(1)
        states_BH = states_BLH[torch.arange(len(states_BLH), device=states_BLH.device), slot_B]
        return states_BH.to(_at_least_float32(states_BH))
    weights_BL = mask_BL.to(_at_least_float32(states_BLH))
    if pooling == "weighted-mean":
        weights_BL = weights_BL * weights_BL.cumsum(1)
    weights_BL = weights_BL / weights_BL.sum(1, keepdim=True)
    # Padding may hold anything, even infinity, which no weight of zero makes harmless.
    states_BLH = states_BLH.to(weights_BL.dtype).masked_fill(mask_BL[..., None] == 0, 0)
    return (states_BLH * weights_BL[..., None]).sum(1)


def _at_least_float32(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)
