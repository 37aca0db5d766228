"""Examples of dense retrieval: a history as text, and the item that came next."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .batches import to_device
from .retrieval_texts import RetrievalTexts
from .splits import Phase, Split
from .texts import TextBatch


@dataclass(frozen=True)
class RetrievalBatch:
    """Users as texts, in training with the items that they took next; texts come in pieces of a few rows."""

    users: tuple[TextBatch, ...]  # B rows in all
    items: tuple[TextBatch, ...] = ()  # training only: the n distinct targets
    item_ids: Tensor | None = None  # [n] int64: which items those are
    targets: Tensor | None = None  # [T] int64: the item of each user that has a label, T = B or 0
    places: Tensor | None = None  # [T] int64: where it is among the n
    log_q: Tensor | None = None  # [T] float32: log-probability that a training example has this target
    seen: Tensor | None = None  # [2, S] int64: row and item of everything that the users took in training
    progress: float = 0.0  # epochs trained before the batch's step
    row: Tensor | None = None  # [B] int64, evaluation only: index into split.targets(phase)
    count: int = 0

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""
        moved = {name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        texts = {name: tuple(part.to(device) for part in getattr(self, name)) for name in ("users", "items")}
        return replace(self, **moved, **texts)  # type: ignore[arg-type]

    def muted(self) -> Self:
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        assert self.targets is not None
        assert self.places is not None
        assert self.log_q is not None
        none = {"targets": self.targets[:0], "places": self.places[:0], "log_q": self.log_q[:0]}
        return replace(self, **none, count=0)  # type: ignore[arg-type]


class TrainingCuts:
    """A few cut points of every user's training sequence an epoch: what stands before names the item behind.

    They are drawn without replacement as a function of (seed, epoch, user).
    """

    def __init__(self, split: Split, texts: RetrievalTexts, cuts: int, seed: int, rows: int | None = None) -> None:
        self.split, self.texts, self.seed, self.rows = split, texts, seed, rows
        self.per_user = np.minimum(cuts, split.train_end - 1).clip(min=0)
        self.user = np.repeat(np.arange(split.num_users), self.per_user)
        self.draw = np.arange(len(self.user)) - np.repeat(np.cumsum(self.per_user) - self.per_user, self.per_user)
        whole = [len(texts.user(split.training_items(user)[:-1])) if n else 0 for user, n in enumerate(self.per_user)]
        self.lengths = np.array(whole, np.int64)[self.user]  # of the longest cut
        with np.errstate(divide="ignore"):  # what is never a target is never looked up
            self.log_q = np.log(self.target_probability())

    def target_probability(self) -> np.ndarray:
        """Return how likely an example has each item as its target, [N + 1]."""
        weight = np.zeros(self.split.num_items + 1)
        for user in np.flatnonzero(self.per_user):
            targets = self.split.training_items(int(user))[1:]
            np.add.at(weight, targets, self.per_user[user] / len(targets))
        return weight / weight.sum()

    def positions(self, user: int, epoch: int) -> np.ndarray:
        """Return where a user's sequence is cut in an epoch: the positions of the targets."""
        random = np.random.default_rng((self.seed, epoch, user))
        return 1 + random.choice(int(self.split.train_end[user]) - 1, int(self.per_user[user]), replace=False)

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> RetrievalBatch:
        users = self.user[indices]
        cuts = [int(self.positions(int(u), epoch)[draw]) for u, draw in zip(users, self.draw[indices], strict=True)]
        sequences = [self.split.training_items(int(user)) for user in users]
        cases = list(zip(sequences, cuts, strict=True))
        if self.rows is not None:  # the longest texts first, so that passes hold little padding
            cases.sort(key=lambda case: -len(self.texts.user(case[0][: case[1]])))
        targets = np.array([items[cut] for items, cut in cases], np.int64)
        distinct, places = np.unique(targets, return_inverse=True)
        taken = [items for items, _ in cases]
        seen = np.stack([np.repeat(np.arange(len(taken)), list(map(len, taken))), np.concatenate(taken)])
        histories = [items[:cut] for items, cut in cases]
        return RetrievalBatch(
            self.texts.user_batches(histories, self.rows),
            self.texts.item_batches(distinct, self.rows),
            torch.from_numpy(distinct),
            torch.from_numpy(targets),
            torch.from_numpy(places),
            torch.from_numpy(self.log_q[targets].astype(np.float32)),
            torch.from_numpy(seen),
            progress,
            count=len(targets),
        )


class EvaluationHistories:
    """The history before each target of a phase."""

    def __init__(self, split: Split, phase: Phase, texts: RetrievalTexts) -> None:
        self.split, self.texts, self.cases = split, texts, split.targets(phase)
        self.lengths = np.array([len(texts.user(self._history(case))) for case in range(len(self.cases))], np.int64)

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> RetrievalBatch:
        row = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return RetrievalBatch(self.texts.user_batches([self._history(int(case)) for case in indices]), row=row)

    def _history(self, case: int) -> np.ndarray:
        return self.split.history(int(self.cases.user[case]), int(self.cases.position[case]))
