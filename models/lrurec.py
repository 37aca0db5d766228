"""LRURec: linear recurrent units over item ids (Yue et al., "Linear Recurrent Units for Sequential Recommendation").

arXiv 2310.02367; the layer and its initial values are those of Orvieto et al., arXiv 2303.06349.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import SequenceBatch

from .dropout import dropout
from .linear_recurrence import linear_recurrence
from .sequence_recommender import SequenceConfig, SequenceRecommender, with_bias

CHANNELS = 2  # complex channels of the recurrence, as a multiple of the width
INNER = 4  # width of the feed-forward layer, likewise


@dataclass
class LRURecConfig(SequenceConfig):
    """LRURec's shape and loss."""

    num_blocks: int = 2
    """Blocks of a linear recurrence and a feed-forward layer."""
    min_decay: float = 0.8
    """Smallest share of a channel's state that a step keeps when training starts, |lambda|."""
    max_decay: float = 0.99
    """Largest share; the squares of the shares are uniform in between."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_decay < self.max_decay < 1:
            raise ValueError(
                f"--method.min_decay {self.min_decay} and --method.max_decay {self.max_decay}: expected 0 <= min_decay "
                "< max_decay < 1"
            )


class LinearRecurrentUnit(nn.Module):
    """Re(W_out h_t), h_t = lambda h_{t-1} + gamma (W_in x_t + b_in), with complex h: [B, L, H] -> [B, L, H].

    Weights are real: a complex map of a real vector is a real map to (real, imaginary) pairs, and the real part of a
    complex map is a real map of such pairs.
    """

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        channels = CHANNELS * config.hidden_size
        self.inputs = nn.Linear(config.hidden_size, 2 * channels)
        self.outputs = nn.Linear(2 * channels, config.hidden_size)
        square = torch.empty(channels).uniform_(config.min_decay**2, config.max_decay**2)
        # Vectors, so that weight decay leaves them alone. gamma keeps the size of states near that of their inputs.
        self.log_nu = nn.Parameter((-0.5 * square.log()).log())
        self.log_theta = nn.Parameter((2 * math.pi * (1 - torch.rand(channels))).log())
        self.log_gamma = nn.Parameter(0.5 * (1 - square).log())

    def forward(self, x_BLH: Tensor) -> Tensor:
        dtype = self.log_nu.dtype  # the recurrence stays in it under autocast, where it would add up rounding errors
        decay_C = torch.polar((-self.log_nu.exp()).exp(), self.log_theta.exp())
        inputs_BLC = torch.view_as_complex(self.inputs(x_BLH).to(dtype).unflatten(-1, (-1, 2)))
        states_BLC = linear_recurrence(inputs_BLC * self.log_gamma.exp(), decay_C)
        return self.outputs(torch.view_as_real(states_BLC).flatten(-2))


class LRURecBlock(nn.Module):
    """A linear recurrence and a feed-forward layer, each with Post-LN, [B, L, H] -> [B, L, H]."""

    def __init__(self, config: LRURecConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dropout = config.dropout
        self.recurrence = LinearRecurrentUnit(config)
        self.recurrence_norm = nn.LayerNorm(hidden)
        self.inner = nn.Linear(hidden, INNER * hidden)
        self.outer = nn.Linear(INNER * hidden, hidden)
        self.feed_forward_norm = nn.LayerNorm(hidden)

    def forward(self, x_BLH: Tensor) -> Tensor:
        x_BLH = self.recurrence_norm(x_BLH + self._drop(self.recurrence(x_BLH)))
        inner = self._drop(F.gelu(self.inner(x_BLH)))
        return self.feed_forward_norm(x_BLH + self._drop(self.outer(inner)))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


class LRURec(SequenceRecommender):
    """A stack of linear recurrences over item embeddings; every item has a bias."""

    config: LRURecConfig
    score_parameters = ("item_bias", "output_embedding")

    def __init__(self, config: LRURecConfig, num_items: int) -> None:
        super().__init__(config, num_items)
        self.embedding_norm = nn.LayerNorm(config.hidden_size)
        self.blocks = nn.ModuleList(LRURecBlock(config) for _ in range(config.num_blocks))
        self.item_bias = nn.Parameter(torch.zeros(num_items + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from a normal distribution that is cut at two standard deviations; biases are zero."""
        std = self.config.initializer_range
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):
                nn.init.zeros_(module.weight[0].detach())

    def states(self, batch: SequenceBatch) -> Tensor:
        """Return the state after every event, [B, L, H]."""
        x = dropout(self.item_embedding(batch.items), self.config.dropout, self.training)
        x = self.embedding_norm(x)
        for block in self.blocks:
            x = block(x)
        return x

    def operands(self, states_H: Tensor) -> tuple[Tensor, Tensor]:
        """Return operands with one more column, for the items' biases."""
        return with_bias(states_H, self.output_table, self.item_bias)
