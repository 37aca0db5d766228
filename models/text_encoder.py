"""A language model as a text encoder: one vector a text."""

from torch import Tensor, nn

from data.texts import TextBatch

from .backbone import Backbone, causal_model
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
