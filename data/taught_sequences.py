"""Training sequences with what a teacher said at each of their positions."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import SequenceBatch, TrainingSequences, on_device
from .candidate_store import CandidateStore, cut_rows, training_cuts
from .negatives import UniformNegatives
from .splits import Split
from .title_tokens import ranges


@dataclass(frozen=True)
class TaughtBatch(SequenceBatch):
    """Item histories whose first T of all labels have a list of candidates each, best first."""

    candidates: Tensor | None = None  # [T, K] int64
    distances: Tensor | None = (
        None  # [T, K] float32, -log of the teacher's softmax over the list: the smaller, the surer
    )
    target_distances: Tensor | None = None  # [T] float32, of the true next item; inf where the list does not hold it
    label_negatives: Tensor | None = None  # [T] int64, items the user has not seen

    def to(self, device: torch.device) -> "TaughtBatch":
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> "TaughtBatch":
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        per_label = ("labelled", "targets", "candidates", "distances", "target_distances", "label_negatives")
        found = {name: getattr(self, name) for name in per_label}
        without: dict[str, Any] = {name: tensor[:0] for name, tensor in found.items() if tensor is not None}
        return replace(self, **without, count=0)


class TaughtSequences(TrainingSequences):
    """`TrainingSequences` with a store of candidates for the rows [n] of `training_cuts`.

    No row asks for an event of validation or test, and none was answered from a history that holds one.
    Labels that have no list stand behind those that have one, for each of which `label_negatives` draws a negative.
    """

    def __init__(
        self,
        split: Split,
        window: int,
        windows: str,
        negatives: UniformNegatives | None,
        rows: np.ndarray,
        store: CandidateStore,
        label_negatives: UniformNegatives | None,
    ) -> None:
        super().__init__(split, window, windows, negatives)
        self.store, self.label_negatives = store, label_negatives
        labels = len(training_cuts(split))
        if len(rows) != len(store.items) or (len(rows) and rows.max() >= labels):
            raise ValueError(
                f"the teacher's {len(store.items)} lists are for {len(rows)} rows up to {rows.max(initial=0)}, and "
                f"training has {labels} labels"
            )
        self.place = np.full(labels, -1)  # of each row in the store; -1 where it has no list
        self.place[rows] = np.arange(len(rows))

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> TaughtBatch:
        batch = super().collate(indices, epoch, progress)
        assert batch.labelled is not None
        assert batch.targets is not None
        user, start, end = self.spans[indices].T
        users, positions = np.repeat(user, end - start), ranges(start + 1, end - start)
        assert (positions < self.split.train_end[users]).all(), "a held-out event among the labels"
        places = self.place[cut_rows(self.split, users, positions)]
        order = torch.from_numpy(np.argsort(places < 0, kind="stable"))
        taught = places[places >= 0]
        targets = batch.targets[order]
        batch = replace(batch, labelled=batch.labelled[order], targets=targets)
        scores = torch.from_numpy(self.store.scores[taught])
        distances = -scores.log_softmax(1)
        candidates = torch.from_numpy(self.store.items[taught].astype(np.int64))
        hit = candidates == targets[: len(taught), None]
        target_distances = distances.masked_fill(~hit, torch.inf).amin(1)
        drawn = None
        if self.label_negatives is not None:
            every = self.label_negatives.draw_each(user, indices, end - start, epoch)
            drawn = torch.from_numpy(every)[order[: len(taught)]]
        return TaughtBatch(
            **vars(batch),
            candidates=candidates,
            distances=distances,
            target_distances=target_distances,
            label_negatives=drawn,
        )
