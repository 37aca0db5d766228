"""Examples of item prompts: what trains and evaluates a model that reads item vectors."""

from dataclasses import replace

import numpy as np
import torch

from .batches import TrainingSequences
from .item_prompts import ItemPromptBatch, ItemPromptLayout, ItemPromptSettings
from .negatives import SharedNegatives
from .splits import Phase, Split


class TrainingItemPrompts:
    """Every training item that has a history, once an epoch.

    Where the layout trains every position a row is a window of a user's sequence; else it is a target with what came
    before. `spans` [n, 3] are other windows of inputs start..end-1.
    """

    def __init__(
        self,
        split: Split,
        layout: ItemPromptLayout,
        settings: ItemPromptSettings,
        negatives: SharedNegatives | None = None,
        spans: np.ndarray | None = None,
    ) -> None:
        self.split, self.layout, self.negatives = split, layout, negatives
        self.with_first = settings.empty_history and spans is None
        if spans is not None:
            self.spans = spans
        elif layout.trains_every_position:
            self.spans = TrainingSequences(split, settings.max_history, "all").spans
        else:
            self.spans = _prefixes(split, settings)
        self.lengths = layout.lengths([self._window(*span) for span in self.spans])

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> ItemPromptBatch:
        spans = self.spans[indices]
        batch, item_ends, row_ends = self.layout.batch([self._window(*span) for span in spans])
        if self.layout.trains_every_position:
            labelled, targets = self._label_positions(spans, batch, item_ends)
        else:
            labelled, targets = row_ends, np.concatenate([self._window(user, end, end + 1) for user, _, end in spans])
        batch = replace(
            batch,
            labelled=torch.from_numpy(labelled),
            targets=torch.from_numpy(targets.astype(np.int64)),
            count=len(labelled),
        )
        if self.negatives is None:
            return batch
        items, log_expected = self.negatives.draw(int(indices[0]), epoch)
        return replace(batch, negatives=torch.from_numpy(items), log_expected=torch.from_numpy(log_expected))

    def _label_positions(
        self, spans: np.ndarray, batch: ItemPromptBatch, item_ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each item of a window names the next one; the instruction names a user's first one, where that is asked."""
        targets = np.concatenate([self._window(user, start + 1, end + 1) for user, start, end in spans])
        if not self.with_first:
            return item_ends, targets
        beginning = np.flatnonzero(spans[:, 1] == 0)
        before = 1 if self.layout.shares_prefix else len(self.layout.before)
        firsts = np.array([self._window(spans[i, 0], 0, 1)[0] for i in beginning], np.int64)
        first_ends = beginning * batch.input_ids.shape[1] + before - 1
        return np.concatenate([item_ends, first_ends]), np.concatenate([targets, firsts])

    def _window(self, user: int, start: int, end: int) -> np.ndarray:
        return self.split.history(int(user), int(end))[int(start) :]


def _prefixes(split: Split, settings: ItemPromptSettings) -> np.ndarray:
    """Spans (user, start, end) of the published training: the items start..end-1 name item `end`."""
    spans = []
    for user, length in enumerate(split.train_end):
        first = max(0 if settings.empty_history else 1, int(length) - settings.max_targets)
        spans += [(user, max(0, end - settings.max_history), end) for end in range(first, int(length))]
    return np.array(spans, dtype=np.int64).reshape(-1, 3)


class EvaluationItemPrompts:
    """The history before each target of a phase; one place a row is read."""

    def __init__(self, split: Split, phase: Phase, layout: ItemPromptLayout, max_history: int) -> None:
        self.split, self.layout, self.max_history = split, layout, max_history
        self.cases = split.targets(phase)
        self.lengths = layout.lengths([self._history(case) for case in range(len(self.cases.user))])

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> ItemPromptBatch:
        batch, _, row_ends = self.layout.batch([self._history(int(case)) for case in indices])
        row = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return replace(batch, labelled=torch.from_numpy(row_ends), row=row)

    def _history(self, case: int) -> np.ndarray:
        history = self.split.history(int(self.cases.user[case]), int(self.cases.position[case]))
        return history[max(0, len(history) - self.max_history) :]
