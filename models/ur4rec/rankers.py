"""Base rankers of candidate lists: three that compare the candidates of a list, two that read the history.

Sources: DLCM, Ai et al., arXiv 1804.05936; PRM, Pei et al., arXiv 1904.06813; SetRank, Pang et al., arXiv 1912.05891.
Candidates come as vectors of item ids, beside which UR4Rec puts what the texts say of each.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from data.batches import SequenceBatch
from models.sequence_recommender import SequenceRecommender

from ..dropout import dropout
from .layers import Attend, FeedForward

INDUCED = 20  # points that SetRank compares candidates through, as published


class ListRanker(nn.Module):
    """Scores a list of candidates; a subclass owns the vectors of item ids."""

    @property
    @abstractmethod
    def item_embedding(self) -> nn.Embedding:
        """[N + 1, H], row 0 is padding."""

    @abstractmethod
    def forward(self, history: SequenceBatch, items_BCH: Tensor, said_BCD: Tensor | None) -> Tensor:
        """Return scores [B, C]; `said_BCD` is what the texts say of the candidates."""


class HistoryRanker(ListRanker):
    """SASRec or GRU4Rec: the product of the history's state with each candidate's vector.

    With texts a linear map takes both vectors of a candidate to one; at first it is that of the id.
    """

    def __init__(self, body: SequenceRecommender, said_width: int) -> None:
        super().__init__()
        self.body, width = body, body.config.hidden_size
        self.join: nn.Linear | None = None
        if said_width:
            self.join = nn.Linear(width + said_width, width)
            nn.init.zeros_(self.join.bias)
            nn.init.normal_(self.join.weight, std=body.config.initializer_range)
            nn.init.eye_(self.join.weight.detach()[:, :width])

    @property
    def item_embedding(self) -> nn.Embedding:
        return self.body.item_embedding

    def forward(self, history: SequenceBatch, items_BCH: Tensor, said_BCD: Tensor | None) -> Tensor:
        if self.join is not None:
            assert said_BCD is not None
            items_BCH = self.join(torch.cat([items_BCH, said_BCD.to(items_BCH.dtype)], dim=-1))
        return (items_BCH @ self.body.user_states(history).to(items_BCH.dtype)[..., None]).squeeze(-1)


class Comparer(ListRanker):
    """A candidate's vector, the history's mean and what the texts say, made one; a subclass compares candidates."""

    def __init__(self, num_items: int, width: int, said_width: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items + 1, width, padding_idx=0)
        nn.init.normal_(self.items.weight.detach()[1:], std=0.02)
        self.join, self.dropout = nn.Linear(2 * width + said_width, width), dropout
        self.score = nn.Linear(width, 1)

    @property
    def item_embedding(self) -> nn.Embedding:
        return self.items

    @abstractmethod
    def compare(self, x_BCH: Tensor) -> Tensor:
        """Return each candidate's vector as one of its list, [B, C, H]."""

    def forward(self, history: SequenceBatch, items_BCH: Tensor, said_BCD: Tensor | None) -> Tensor:
        mean_BH = self.items(history.items).sum(1) / history.lengths[:, None].clamp(min=1)
        parts = [items_BCH, mean_BH[:, None].expand_as(items_BCH)]
        if said_BCD is not None:
            parts.append(said_BCD.to(items_BCH.dtype))
        x_BCH = dropout(self.join(torch.cat(parts, dim=-1)), self.dropout, self.training)
        return self.score(self.compare(x_BCH)).squeeze(-1)


class DLCM(Comparer):
    """A GRU reads the list from its end, so that the best come last, and its last state weighs each candidate."""

    def __init__(self, num_items: int, width: int, said_width: int, dropout: float) -> None:
        super().__init__(num_items, width, said_width, dropout)
        self.gru, self.context = nn.GRU(width, width, batch_first=True), nn.Linear(width, width)

    def compare(self, x_BCH: Tensor) -> Tensor:
        states_BCH, last_1BH = self.gru(x_BCH.flip(1))
        return states_BCH.flip(1) * self.context(last_1BH[0]).tanh()[:, None]


class PRM(Comparer):
    """Self-attention among the candidates, each with a vector of its place in the list."""

    def __init__(
        self, num_items: int, width: int, said_width: int, dropout: float, blocks: int, heads: int, places: int
    ) -> None:
        super().__init__(num_items, width, said_width, dropout)
        self.places = nn.Embedding(places, width)
        nn.init.normal_(self.places.weight.detach(), std=0.02)
        layers = ((Attend(width, heads, dropout), FeedForward(width, dropout)) for _ in range(blocks))
        self.layers = nn.Sequential(*(layer for pair in layers for layer in pair), nn.LayerNorm(width))

    def compare(self, x_BCH: Tensor) -> Tensor:
        return self.layers(x_BCH + self.places(torch.arange(x_BCH.shape[1], device=x_BCH.device)))


class SetRank(Comparer):
    """Candidates look at learned points that have looked at all of them: their order says nothing."""

    def __init__(self, num_items: int, width: int, said_width: int, dropout: float, blocks: int, heads: int) -> None:
        super().__init__(num_items, width, said_width, dropout)
        self.blocks = nn.ModuleList(InducedBlock(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def compare(self, x_BCH: Tensor) -> Tensor:
        for block in self.blocks:
            x_BCH = block(x_BCH)
        return self.norm(x_BCH)


class InducedBlock(nn.Module):
    """Attention through learned points, [B, C, H] -> [B, C, H]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(INDUCED, width))
        self.gather, self.spread = Attend(width, heads, dropout), Attend(width, heads, dropout)
        self.after_gather, self.after_spread = FeedForward(width, dropout), FeedForward(width, dropout)

    def forward(self, x_BCH: Tensor) -> Tensor:
        points_BIH = self.after_gather(self.gather(self.points.expand(len(x_BCH), -1, -1), x_BCH))
        return self.after_spread(self.spread(x_BCH, points_BIH))
