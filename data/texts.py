"""Texts for an encoder: rows of tokens, and which of them speak for the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .batches import pad, to_device


@dataclass(frozen=True)
class TextBatch:
    """Token rows padded on the right, since an encoder's positions count from the first token, pads included."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64: 1 for tokens
    pool_mask: Tensor  # [B, L] int64: 1 for tokens that are pooled; an instruction before them is read, not pooled

    @classmethod
    def of(cls, texts: Sequence[np.ndarray], skipped: int = 0) -> Self:
        """Pad the texts; their first `skipped` tokens are an instruction, where more tokens follow."""
        input_ids, attention_mask = map(torch.from_numpy, pad(texts, side="right"))
        has_more = (attention_mask.sum(1, keepdim=True) > skipped).long()
        pool_mask = attention_mask.clone()
        pool_mask[:, :skipped] *= 1 - has_more
        return cls(input_ids, attention_mask, pool_mask)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""
        tensors = (self.input_ids, self.attention_mask, self.pool_mask)
        return type(self)(*(to_device(tensor, device) for tensor in tensors))
