"""What recommenders of item ids share: one state after every event, and items that the states are matched with."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import SequenceBatch

from . import losses
from .base import Loss, Recommender

BIAS_COLUMNS = 8  # the bias and zeros: tensor cores want rows of 16-bit numbers in multiples of 16 bytes


@dataclass
class SequenceConfig:
    """Width, window and loss of a recommender that reads item ids."""

    hidden_size: int = 64
    """Width of the item embeddings, and of the states that are matched with them."""
    dropout: float = 0.2
    """Dropout on embeddings and inside the layers."""
    window: int = 200
    """Longest history, in events, that the model sees."""
    windows: Literal["last", "all"] = "last"
    """Train on each user's most recent window (as published), or on the whole sequence cut into windows."""
    tied: bool = True
    """Match states with the vectors that are read; false gives the items a second table to be matched with."""
    loss: Literal["cross-entropy", "sampled-cross-entropy", "gbce", "bce"] = "cross-entropy"
    """Full softmax over the catalogue, or one of the losses with sampled negatives."""
    num_negatives: int = 256
    """Negatives of the sampled losses, drawn once a sequence among unseen items (published BCE: 1)."""
    gbce_t: float = 0.75
    """Calibration of gBCE: 0 is BCE, 1 gives calibrated probabilities."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""


class SequenceRecommender(Recommender):
    """Scores every item by the dot product of its embedding with the state after the last event.

    A subclass says how states come about. States must be causal: histories are padded on the right, and no event may
    see what stands behind it.
    """

    score_parameters: tuple[str, ...] = (
        "output_embedding",
    )  # how parameters' names begin that scores read and states do not

    def __init__(self, config: SequenceConfig, num_items: int) -> None:
        super().__init__()
        self.config, self.num_items = config, num_items
        self.item_embedding = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
        self.output_embedding: nn.Embedding | None = None
        if not config.tied:
            self.output_embedding = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)

    @abstractmethod
    def states(self, batch: SequenceBatch) -> Tensor:
        """Return the state after every event, [B, L, H], where the event is in the batch."""

    @property
    def item_table(self) -> Tensor:
        """The item vectors that states are made of, [N + 1, H]; row 0 is padding."""
        return self.item_embedding.weight

    def catalogue_vectors(self) -> Tensor:
        """Return a copy of the item vectors that states are made of."""
        return self.item_table.detach().clone()

    @property
    def output_table(self) -> Tensor:
        """The item vectors that states are matched with, [N + 1, H]: the same ones in a tied model."""
        return self.item_table if self.output_embedding is None else self.output_embedding.weight

    def read(self, batch: SequenceBatch) -> Tensor:
        """Return the states at the labelled slots, [T, H]."""
        assert batch.labelled is not None
        # Slots are known from the collator: a mask would make the host wait for the device to count them.
        return self.states(batch).flatten(0, 1).index_select(0, batch.labelled)

    def operands(self, states_H: Tensor) -> tuple[Tensor, Tensor]:
        """Return [..., D] and [N + 1, D] whose products are the scores that states [..., H] give to the items."""
        return states_H, self.output_table

    def user_states(self, batch: SequenceBatch) -> Tensor:
        """Return the state after the last event, [B, H]; after the first slot where there is no event."""
        states_BLH = self.states(batch)
        rows = torch.arange(len(states_BLH), device=states_BLH.device)
        return states_BLH[rows, (batch.lengths - 1).clamp(min=0)]

    def read_by_states(self) -> list[nn.Parameter]:
        """Return the parameters that get a gradient when only `states` is used."""
        return [p for name, p in self.named_parameters() if not name.startswith(self.score_parameters)]

    def loss(self, batch: SequenceBatch) -> Loss:  # type: ignore[override]
        """Return the loss of every labelled position."""
        return self.loss_of_states(self.states(batch), batch)

    def loss_of_states(self, states_BLH: Tensor, batch: SequenceBatch) -> Loss:
        """Return the loss of every labelled position, whose states are known."""
        assert batch.labelled is not None
        assert batch.targets is not None
        query_BLD, table_ND = self.operands(states_BLH)
        # Slots are known from the collator: a mask would make the host wait for the device to count them.
        query_TD = query_BLD.flatten(0, 1).index_select(0, batch.labelled)
        if self.config.loss == "cross-entropy":
            return Loss(losses.full_cross_entropy(query_TD, table_ND[1:], batch.targets - 1), batch.count)
        assert batch.negatives is not None
        positive_T = (query_TD * F.embedding(batch.targets, table_ND)).sum(-1)
        # The negatives belong to a row, so its positions share one gathered table.
        negatives_BDK = F.embedding(batch.negatives, table_ND).transpose(1, 2)
        negative_TK = (query_BLD @ negatives_BDK).flatten(0, 1).index_select(0, batch.labelled)
        return Loss(self._sampled_loss(positive_T, negative_TK), batch.count)

    def _sampled_loss(self, positive_T: Tensor, negative_TK: Tensor) -> Tensor:
        if self.config.loss == "sampled-cross-entropy":
            return losses.sampled_cross_entropy(positive_T, negative_TK)  # no hits: the negatives are unseen items
        t = self.config.gbce_t if self.config.loss == "gbce" else 0.0
        return losses.gbce(positive_T, negative_TK, losses.gbce_beta(negative_TK.shape[1], self.num_items, t))

    def scores(self, batch: SequenceBatch) -> Tensor:  # type: ignore[override]
        """Return scores [B, N + 1] float32, column 0 (padding) at -inf."""
        users = self.user_states(batch)
        with torch.autocast(users.device.type, enabled=False):
            query_BD, table_ND = self.operands(users.float())
            scores = query_BD @ table_ND.float().T
        scores[:, 0] = -torch.inf
        return scores


def with_bias(states_H: Tensor, table_NH: Tensor, bias_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return operands whose products also add a bias for each item: one more column, which states have at 1."""
    states_D = F.pad(F.pad(states_H, (0, 1), value=1.0), (0, BIAS_COLUMNS - 1))
    return states_D, F.pad(torch.cat([table_NH, bias_N[:, None]], dim=1), (0, BIAS_COLUMNS - 1))
