"""DLLM2Rec: a recommender of item ids that learns from the lists and the item vectors of a larger one.

Source: Cui et al., arXiv 2405.00338. The teacher is asked before training and is not here; neither is it when the
student recommends: `plain_weights` are those of an ordinary student.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from data.batches import SequenceBatch
from data.taught_sequences import TaughtBatch

from . import losses
from .base import Loss, Recommender
from .distillation import (
    Lists,
    RankingConfig,
    RobustConfig,
    importance_weights,
    propensities,
    ranking_loss,
    robust_terms,
)
from .gru4rec import GRU4RecConfig
from .lrurec import LRURecConfig
from .sasrec import SASRecConfig
from .sequence_recommender import SequenceConfig, SequenceRecommender

_ITEMS = "item_embedding"  # of a student, whose `weight` is made of the original and of what is added to it


@dataclass
class VectorsConfig:
    """Item vectors of a language model inside the student's own."""

    source: Literal["none", "teacher", "encoder"] = "none"
    """teacher: the item vectors of --method.teacher, which must have some; encoder: what a text encoder makes of each
    title."""
    encoder: str = "minilm"
    """Text encoder of `source: encoder`: minilm, a folder or a hub id. It is read once, not trained."""
    weight: float = 0.3
    """Factor of the projected vector beside the student's own, learned one."""


@dataclass
class DLLM2RecConfig:
    """A teacher, and what a student learns from it; the student's own settings are in `student`."""

    teacher: Path | None = None
    """Run folder of the teacher: any model that scores the whole catalogue. Or what launch/label.py wrote of one."""
    teacher_k: int = 10
    """Items of each of its lists."""
    ranking: RankingConfig = field(default_factory=RankingConfig)
    """Learning from its lists."""
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    """Learning from item vectors. They are read and, in a tied student, matched with (published: not tied)."""
    robust: RobustConfig = field(default_factory=RobustConfig)
    """DROS, an addition to the student's own loss."""
    student: SequenceConfig = field(default_factory=SequenceConfig)
    """The student's own settings; which student it is, the classes below say."""

    def __post_init__(self) -> None:
        if self.teacher_k < 1:
            raise ValueError(f"--method.teacher_k {self.teacher_k}: expected at least 1")


@dataclass
class DLLM2RecSASRecConfig(DLLM2RecConfig):
    """DLLM2Rec with SASRec as the student."""

    student: SASRecConfig = field(default_factory=SASRecConfig)
    """SASRec's own settings."""


@dataclass
class DLLM2RecGRU4RecConfig(DLLM2RecConfig):
    """DLLM2Rec with GRU4Rec as the student."""

    student: GRU4RecConfig = field(default_factory=GRU4RecConfig)
    """GRU4Rec's own settings."""


@dataclass
class DLLM2RecLRURecConfig(DLLM2RecConfig):
    """DLLM2Rec with LRURec as the student."""

    student: LRURecConfig = field(default_factory=LRURecConfig)
    """LRURec's own settings."""


class AddProjected(nn.Module):
    """A table of learned offsets b -> b + weight (W z + c), where the vectors z are given."""

    vectors: Tensor

    def __init__(self, vectors_ND: Tensor, width: int, weight: float, initializer_range: float) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("vectors", vectors_ND, persistent=False)
        self.projector = nn.Linear(vectors_ND.shape[1], width)
        nn.init.normal_(self.projector.weight, std=initializer_range)
        nn.init.zeros_(self.projector.bias)

    def forward(self, offset_NH: Tensor) -> Tensor:
        """Return the item vectors, [N + 1, H]."""
        return offset_NH + self.weight * self.projector(self.vectors)


class DLLM2Rec(Recommender):
    """A student, with the terms that a teacher adds to its loss and the vectors that it adds to its items."""

    propensity_N: Tensor

    def __init__(
        self, config: DLLM2RecConfig, student: SequenceRecommender, item_counts_N: Tensor, vectors_ND: Tensor | None
    ) -> None:
        """`item_counts_N` are the training events of items 1..N; `vectors_ND` [N + 1, D], row 0 for padding."""
        super().__init__()
        self.config, self.student = config, student
        self.register_buffer("propensity_N", propensities(item_counts_N).float(), persistent=False)
        if vectors_ND is not None:
            own = student.config
            added = AddProjected(vectors_ND, own.hidden_size, config.vectors.weight, own.initializer_range)
            parametrize.register_parametrization(student.item_embedding, "weight", added)

    def loss(self, batch: SequenceBatch) -> Loss:  # type: ignore[override]
        """Return the student's own loss and what the teacher adds, over every labelled position."""
        assert batch.labelled is not None
        with parametrize.cached():  # the catalogue is projected once a pass, for all that is read and matched
            states_BLH = self.student.states(batch)
            query_BLD, table_ND = self.student.operands(states_BLH)
            query_TD = query_BLD.flatten(0, 1).index_select(0, batch.labelled)
            if self._shares_softmax:
                return self._loss_of_soft_labels(query_TD, table_ND[1:], batch)
            own = self.student.loss_of_states(states_BLH, batch)
        terms = self._added_terms(batch)
        if not terms:
            return own
        added = losses.in_chunks(query_TD, table_ND[1:], lambda scores_CN, rows: sum_of(terms, scores_CN, rows))
        return Loss(own.total + added, own.count, {"student": own.total.detach(), "teacher": added.detach()})

    @property
    def _shares_softmax(self) -> bool:
        """Whether the student's own loss and the lists need one softmax over the catalogue, and nothing else does."""
        config, own = self.config, self.student.config.loss
        return own == "cross-entropy" and config.ranking.loss == "softmax" and not config.robust.weight

    def _loss_of_soft_labels(self, query_TD: Tensor, table_ND: Tensor, batch: SequenceBatch) -> Loss:
        """Return the loss of both, where the lists are further labels of the student's own cross-entropy."""
        assert batch.targets is not None
        target_T1, ranking = batch.targets[:, None] - 1, self.config.ranking

        def labels_of(scores_CN: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            here = lists_of(batch).of(rows)  # the first ones: labels without a list stand last
            weight_TK = importance_weights(scores_CN[: len(here.items_TK)], here, ranking).to(scores_CN.dtype)
            weight_TK = ranking.weight * weight_TK
            without = (0, 0, 0, len(scores_CN) - len(weight_TK))
            items_CK, weight_CK = F.pad(here.items_TK, without), F.pad(weight_TK, without)
            return torch.cat([target_T1[rows], items_CK], 1), F.pad(weight_CK, (1, 0), value=1.0)

        parts: list[Tensor] = []
        total = losses.soft_cross_entropy(query_TD, table_ND, labels_of, parts)
        each = torch.stack(parts).sum(0) if parts else total.detach().expand(2)
        return Loss(total, batch.count, {"student": each[0], "teacher": each[1:].sum()})

    def _added_terms(self, batch: SequenceBatch) -> list[losses.LossOfScores]:
        """What is added to the student's own loss, as functions of scores [C, N] and their rows."""
        assert batch.targets is not None
        ranking, robust = self.config.ranking, self.config.robust
        target_T1 = batch.targets[:, None] - 1
        terms: list[losses.LossOfScores] = []

        def of_target(scores_CN: Tensor, rows: slice) -> Tensor:
            robust_C1 = robust_terms(scores_CN, self.propensity_N, robust.temperature, target_T1[rows])
            return robust.weight * robust_C1.sum()

        def of_lists(scores_CN: Tensor, rows: slice) -> Tensor:
            here = lists_of(batch).of(rows)  # the first ones: labels without a list stand last
            taught = scores_CN[: len(here.items_TK)]
            return ranking.weight * ranking_loss(taught, here, ranking, robust, self.propensity_N)

        if robust.weight:
            terms.append(of_target)
        if ranking.loss != "none":
            terms.append(of_lists)
        return terms

    def scores(self, batch: SequenceBatch) -> Tensor:  # type: ignore[override]
        """Return the student's scores [B, N + 1] float32."""
        with parametrize.cached():
            return self.student.scores(batch)

    def plain_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return trained weights of this model as those of the student alone: one plain table of items."""
        own = {name.removeprefix("student."): tensor for name, tensor in weights.items()}
        if parametrize.is_parametrized(self.student.item_embedding):
            added = self.student.item_embedding.parametrizations["weight"][0]  # type: ignore[index]
            assert isinstance(added, AddProjected)
            parts = f"{_ITEMS}.parametrizations.weight"
            projected = nn.functional.linear(
                added.vectors.cpu(), own.pop(f"{parts}.0.projector.weight"), own.pop(f"{parts}.0.projector.bias")
            )
            own[f"{_ITEMS}.weight"] = own.pop(f"{parts}.original") + added.weight * projected
        return own


def lists_of(batch: SequenceBatch) -> Lists:
    """Return a teacher's lists by column of scores that begin with item 1: those of the first labels."""
    assert isinstance(batch, TaughtBatch)
    assert batch.targets is not None
    assert batch.candidates is not None
    assert batch.distances is not None
    assert batch.target_distances is not None
    negatives, targets = batch.label_negatives, batch.targets[: len(batch.candidates)]
    return Lists(
        batch.candidates - 1,
        batch.distances,
        targets - 1,
        batch.target_distances,
        None if negatives is None else negatives - 1,
    )


def sum_of(terms: Sequence[losses.LossOfScores], scores_CN: Tensor, rows: slice) -> Tensor:
    """Return what the terms add up to."""
    return torch.stack([term(scores_CN, rows) for term in terms]).sum()
