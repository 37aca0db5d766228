"""Popularity: the floor that every recommender has to clear."""

from typing import Protocol

import torch
from torch import Tensor, nn

from data.splits import Split


class Rows(Protocol):
    """All that popularity needs to know of a batch."""

    @property
    def row(self) -> Tensor | None:
        """[B] int64: the rows to score."""


class Popularity(nn.Module):
    """Scores every item by its number of training events, for everybody alike; it has nothing to train.

    `counts` [N + 1]: events per item, as `Split.item_counts()` gives them. Items with equal counts stay
    tied, and the evaluator's tie rule decides.
    """

    scores: Tensor

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        scores = counts.to(torch.float32)
        scores[0] = -torch.inf
        self.register_buffer("scores", scores)

    @classmethod
    def of(cls, split: Split) -> "Popularity":
        return cls(torch.from_numpy(split.item_counts()))

    def forward(self, batch: Rows) -> Tensor:
        """Scores [B, N + 1] for the B rows of `batch.row`."""
        assert batch.row is not None, "popularity is counted, not trained"
        return self.scores.expand(len(batch.row), -1)
