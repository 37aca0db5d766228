"""Batches for a model made of models: each member's own batch of the same users, or the scores it is known to give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .batches import Batch, Examples, on_device
from .splits import Phase, Split

NO_FOLD = -1


@dataclass(frozen=True)
class MemberBatch:
    """Users with what each member reads of them (`members`), or with what the members said (`scores`, `state`)."""

    seen: Tensor  # [B, S] int64: items of the history, padded with 0
    lengths: Tensor  # [B] int64: events of the history
    fold: Tensor  # [B] int64: the fold of a validation user, NO_FOLD for others
    members: tuple[Batch, ...] = ()
    scores: Tensor | None = None  # [B, M, N + 1] float32
    state: Tensor | None = None  # [B, D] float32
    targets: Tensor | None = None  # [B] int64, training only; 0 is no label
    row: Tensor | None = None  # [B] int64, evaluation only
    count: int = 0

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""
        return replace(on_device(self, device), members=tuple(batch.to(device) for batch in self.members))

    def muted(self) -> Self:
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        return replace(self, targets=torch.zeros_like(self.lengths), count=0)

    def said(self) -> tuple[Tensor, Tensor | None]:
        """Return the scores and the state that are known."""
        assert self.scores is not None
        return self.scores, self.state


@dataclass(frozen=True)
class KnownScores:
    """What the members say about every target of a phase, in the order of its rows."""

    scores: Tensor  # [n, M, N + 1] float32
    state: Tensor | None  # [n, D] float32


class MemberExamples:
    """The targets of a phase as the members read them, or with `known` scores; with `trains` they are labels.

    `folds` [n] int64 says which validation users no gate of that fold may learn from.
    """

    def __init__(
        self,
        split: Split,
        phase: Phase,
        members: Sequence[Examples],
        folds: np.ndarray | None = None,
        known: KnownScores | None = None,
        trains: bool = False,
    ) -> None:
        self.split, self.members, self.known, self.trains = split, members, known, trains
        self.cases, self.targets = split.targets(phase), split.target_items(phase)
        self.folds = np.full(len(self.cases), NO_FOLD) if folds is None else folds
        self.lengths = self.cases.position.astype(np.int64)

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> MemberBatch:
        cases = [(int(self.cases.user[i]), int(self.cases.position[i])) for i in indices]
        seen = np.zeros((len(indices), max(1, int(self.lengths[indices].max()))), dtype=np.int64)
        for i, (user, position) in enumerate(cases):
            seen[i, :position] = self.split.history(user, position)
        rows = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        batch = MemberBatch(
            torch.from_numpy(seen),
            torch.from_numpy(self.lengths[indices]),
            torch.from_numpy(self.folds[indices]),
            row=None if self.trains else rows,
            targets=torch.from_numpy(self.targets[indices]) if self.trains else None,
            count=len(indices) if self.trains else 0,
        )
        if self.known is not None:
            state = None if self.known.state is None else self.known.state[rows]
            return replace(batch, scores=self.known.scores[rows], state=state)
        members = tuple(examples.collate(indices, 0) for examples in self.members)
        for member in members:
            if member.row is None or not torch.equal(member.row, rows):
                raise ValueError("a member of the ensemble numbers the users of an evaluation otherwise than the split")
        return replace(batch, members=members)
