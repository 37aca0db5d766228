"""SASRec: causal self-attention over item ids (Kang and McAuley, 2018), trained at every position in one pass."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import SequenceBatch

from .attention import attention
from .dropout import dropout
from .sequence_recommender import SequenceConfig, SequenceRecommender


@dataclass
class SASRecConfig(SequenceConfig):
    """SASRec's shape and loss."""

    num_blocks: int = 2
    """Self-attention blocks."""
    num_heads: int = 1
    """Attention heads; must divide hidden_size."""
    feed_forward_size: int | None = None
    """Inner width of the feed-forward layers; the same as hidden_size when not given, as published."""
    attention_dropout: float = 0.0
    """Dropout on attention weights, as published; above 0 it rules out the fused attention kernel on CPU."""
    norm: Literal["original", "pre", "post"] = "original"
    """Layer norm: the paper's code (only the query, and the residual is the normalised query), or Pre-/Post-LN."""
    pads: Literal["right", "left"] = "right"
    """Where short histories are padded. right: no event sees a pad. left: as in the code that E4SRec ships, pads are
    kept at zero, but events attend to them."""
    activation: Literal["relu", "gelu"] = "relu"
    """Activation inside the feed-forward layers."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                "change --method.hidden_size or --method.num_heads"
            )


class SASRecBlock(nn.Module):
    """One block of attention and point-wise feed-forward, [B, L, H] -> [B, L, H]."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.feed_forward_size or config.hidden_size
        self.norm, self.num_heads = config.norm, config.num_heads
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU()
        self.attention_norm = nn.LayerNorm(hidden, eps=1e-8)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.feed_forward_norm = nn.LayerNorm(hidden, eps=1e-8)
        self.inner = nn.Linear(hidden, inner)
        self.outer = nn.Linear(inner, hidden)

    def forward(self, x_BLH: Tensor) -> Tensor:
        if self.norm == "pre":
            x_BLH = x_BLH + self._attend(self.attention_norm(x_BLH))
            return x_BLH + self._feed_forward(self.feed_forward_norm(x_BLH))
        if self.norm == "post":
            x_BLH = self.attention_norm(x_BLH + self._attend(x_BLH))
            return self.feed_forward_norm(x_BLH + self._feed_forward(x_BLH))
        query = self.attention_norm(x_BLH)
        x_BLH = self.feed_forward_norm(query + self._attend(x_BLH, query))
        return x_BLH + self._feed_forward(x_BLH)

    def _attend(self, x_BLH: Tensor, query_BLH: Tensor | None = None) -> Tensor:
        batch, length, hidden = x_BLH.shape
        if query_BLH is None:
            query, key, value = self.query_key_value(x_BLH).chunk(3, dim=-1)
        else:
            weight, bias = self.query_key_value.weight, self.query_key_value.bias
            query = F.linear(query_BLH, weight[:hidden], bias[:hidden])
            key, value = F.linear(x_BLH, weight[hidden:], bias[hidden:]).chunk(2, dim=-1)
        query, key, value = (t.view(batch, length, self.num_heads, -1).transpose(1, 2) for t in (query, key, value))
        dropout = self.attention_dropout if self.training else 0.0
        mixed = attention(query, key, value, is_causal=True, dropout_p=dropout)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, hidden))

    def _feed_forward(self, x_BLH: Tensor) -> Tensor:
        inner = dropout(self.activation(self.inner(x_BLH)), self.dropout, self.training)
        return dropout(self.outer(inner), self.dropout, self.training)


class SASRec(SequenceRecommender):
    """Causal self-attention over item and position embeddings."""

    config: SASRecConfig

    def __init__(self, config: SASRecConfig, num_items: int) -> None:
        super().__init__(config, num_items)
        self.position_embedding = nn.Embedding(config.window + 1, config.hidden_size, padding_idx=0)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=1e-8)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, initializer_range); padding rows and biases are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.zeros_(module.weight[0].detach())

    def encode(self, items_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """Return the state after every event, [B, L, H], with pads where `config.pads` says. The mask is causal."""
        x = self.item_embedding(items_BL) * math.sqrt(self.config.hidden_size)
        x = dropout(x + self.position_embedding(positions_BL), self.config.dropout, self.training)
        real = (items_BL > 0).unsqueeze(-1) if self.config.pads == "left" else None
        x = x if real is None else x * real
        for block in self.blocks:
            x = block(x) if real is None else block(x) * real
        return self.final_norm(x)

    def states(self, batch: SequenceBatch) -> Tensor:
        """Return the state after every event, [B, L, H], where the event is in the batch."""
        if self.config.pads == "right":
            return self.encode(batch.items, self.positions(batch))
        window, length = self.config.window, batch.items.shape[1]
        slots = torch.arange(window, device=batch.items.device)
        event = slots - (window - batch.lengths[:, None])  # that stands in each slot; below 0 is a pad
        items = batch.items.gather(1, event.clamp(min=0)).where(event >= 0, 0)
        states = self.encode(items, (slots + 1).where(items > 0, 0))
        slot_of_event = (slots[:length] + window - batch.lengths[:, None]).clamp(max=window - 1)
        return states.gather(1, slot_of_event.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    def positions(self, batch: SequenceBatch) -> Tensor:
        """Return [B, L] positions that end at `window`, so that the newest event always has the same one."""
        slots = torch.arange(batch.items.shape[1], device=batch.items.device)
        positions = self.config.window - batch.lengths[:, None] + slots + 1
        return positions.where(batch.items > 0, 0)
