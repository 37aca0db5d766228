"""A language model as a text encoder: one vector a text."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.texts import TextBatch

from .backbone import Backbone, causal_model
from .decoder import largest_anywhere
from .pooling import Pooling, pool


class TextEncoder(nn.Module):
    """A backbone without language-model head, an encoder or a decoder of either direction, and how it is pooled."""

    def __init__(self, backbone: Backbone, pooling: Pooling) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling

    @property
    def width(self) -> int:
        """Of its vectors, H."""
        return causal_model(self.backbone).config.get_text_config().hidden_size

    def forward(self, texts: TextBatch) -> Tensor:
        """Return a vector a text, [B, H], in float32 or better."""
        body = causal_model(self.backbone).base_model  # the adapter's layers are in it, the wrapper is not needed
        states = body(input_ids=texts.input_ids, attention_mask=texts.attention_mask, use_cache=False)
        # The first token of all is a class token, whatever instruction follows it.
        mask = texts.attention_mask if self.pooling == "cls" else texts.pool_mask
        return pool(states.last_hidden_state, mask, self.pooling)

    def encode(self, pieces: tuple[TextBatch, ...], *, again: bool = False) -> Tensor:
        """Return the vectors of the texts of all pieces, [n, H]; processes that share weights make as many passes.

        With `again` only vectors are kept, and the backward pass encodes each piece again, with the same dropout: the
        gradients of all vectors are known then, which is GradCache (Gao et al., arXiv 2101.06983) in one backward
        pass, as DDP and ZeRO want it.
        """
        texts = sum(map(len, pieces))
        missing = largest_anywhere(self, len(pieces)) - len(pieces)
        pieces += pieces[:1] * missing  # these have no part in the loss, but in both passes
        if again and torch.is_grad_enabled():
            # To the end, since ZeRO-3 gives weights back where a module ends.
            vectors = [checkpoint(self, piece, use_reentrant=False, early_stop=False) for piece in pieces]
        else:
            vectors = [self(piece) for piece in pieces]
        return torch.cat(vectors)[:texts]
