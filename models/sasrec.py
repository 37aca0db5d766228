"""SASRec: causal self-attention over item ids (Kang and McAuley, 2018), trained at every position in one pass."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import SequenceBatch

from . import losses
from .base import Loss, Recommender


@dataclass
class SASRecConfig:
    """SASRec's shape and loss."""

    hidden_size: int = 64
    """Width of the item embeddings and of every layer."""
    num_blocks: int = 2
    """Self-attention blocks."""
    num_heads: int = 1
    """Attention heads; must divide hidden_size."""
    feed_forward_size: int | None = None
    """Inner width of the feed-forward layers; the same as hidden_size when not given, as published."""
    dropout: float = 0.2
    """Dropout on embeddings and feed-forward layers."""
    attention_dropout: float = 0.0
    """Dropout on attention weights, as published; above 0 it rules out the fused attention kernel on CPU."""
    window: int = 200
    """Longest history, in events, that the model sees."""
    windows: Literal["last", "all"] = "last"
    """Train on each user's most recent window (as published), or on the whole sequence cut into windows."""
    norm: Literal["original", "pre", "post"] = "original"
    """Layer norm: the paper's code (only the query, and the residual is the normalised query), or Pre-/Post-LN."""
    pads: Literal["right", "left"] = "right"
    """Where short histories are padded. right: no event sees a pad. left: as in the code that E4SRec ships, pads are
    kept at zero, but events attend to them."""
    activation: Literal["relu", "gelu"] = "relu"
    """Activation inside the feed-forward layers."""
    loss: Literal["cross-entropy", "sampled-cross-entropy", "gbce", "bce"] = "cross-entropy"
    """Full softmax over the catalogue, or one of the losses with sampled negatives."""
    num_negatives: int = 256
    """Negatives of the sampled losses, drawn once a sequence among unseen items (published BCE: 1)."""
    gbce_t: float = 0.75
    """Calibration of gBCE: 0 is BCE, 1 gives calibrated probabilities."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

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
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(batch, length, hidden))

    def _feed_forward(self, x_BLH: Tensor) -> Tensor:
        inner = F.dropout(self.activation(self.inner(x_BLH)), self.dropout, self.training)
        return F.dropout(self.outer(inner), self.dropout, self.training)


class SASRec(Recommender):
    """Scores every item by the dot product of its embedding with the state after the last event."""

    def __init__(self, config: SASRecConfig, num_items: int) -> None:
        super().__init__()
        self.config, self.num_items = config, num_items
        self.item_embedding = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
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
        x = F.dropout(x + self.position_embedding(positions_BL), self.config.dropout, self.training)
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

    def user_states(self, batch: SequenceBatch) -> Tensor:
        """Return the state after the last event, [B, H]."""
        return last_states(self.states(batch), batch.lengths)

    @property
    def item_table(self) -> Tensor:
        """The item vectors, [N + 1, H]; row 0 is padding."""
        return self.item_embedding.weight

    def operands(self, states_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, H] and [N + 1, H] whose products are the scores that states give to the items."""
        return states_TH, self.item_table

    def positions(self, batch: SequenceBatch) -> Tensor:
        """Return [B, L] positions that end at `window`, so that the newest event always has the same one."""
        slots = torch.arange(batch.items.shape[1], device=batch.items.device)
        positions = self.config.window - batch.lengths[:, None] + slots + 1
        return positions.where(batch.items > 0, 0)

    def loss(self, batch: SequenceBatch) -> Loss:  # type: ignore[override]
        assert batch.labelled is not None
        assert batch.targets is not None
        states_BLH = self.states(batch)
        # Slots are known from the collator: a mask would make the host wait for the device to count them.
        hidden_TH = states_BLH.flatten(0, 1).index_select(0, batch.labelled)
        if self.config.loss == "cross-entropy":
            table = self.item_embedding.weight[1:]
            return Loss(losses.full_cross_entropy(hidden_TH, table, batch.targets - 1), batch.count)
        assert batch.negatives is not None
        positive_T = (hidden_TH * self.item_embedding(batch.targets)).sum(-1)
        # The negatives belong to a row, so its positions share one gathered table.
        negatives_BHK = self.item_embedding(batch.negatives).transpose(1, 2)
        negative_TK = (states_BLH @ negatives_BHK).flatten(0, 1).index_select(0, batch.labelled)
        return Loss(self._sampled_loss(positive_T, negative_TK, batch), batch.count)

    def _sampled_loss(self, positive_T: Tensor, negative_TK: Tensor, batch: SequenceBatch) -> Tensor:
        if self.config.loss == "sampled-cross-entropy":
            return losses.sampled_cross_entropy(positive_T, negative_TK)  # no hits: the negatives are unseen items
        t = self.config.gbce_t if self.config.loss == "gbce" else 0.0
        return losses.gbce(positive_T, negative_TK, losses.gbce_beta(negative_TK.shape[1], self.num_items, t))

    def scores(self, batch: SequenceBatch) -> Tensor:  # type: ignore[override]
        last = self.user_states(batch)
        with torch.autocast(last.device.type, enabled=False):
            query, table = self.operands(last.float())
            scores = query @ table.float().T
        scores[:, 0] = -torch.inf
        return scores


def last_states(states_BLH: Tensor, lengths: Tensor) -> Tensor:
    """Return the state of each row's last event, [B, H]; of the first slot where there is no event."""
    return states_BLH[torch.arange(len(states_BLH), device=states_BLH.device), (lengths - 1).clamp(min=0)]
