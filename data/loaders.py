"""Loaders that group examples by length, share them out to processes, and resume at any step.

The order of examples is a function of (seed, epoch) and of the global batch size alone. A step therefore trains the
same examples on one process with accumulation and on many without, and nothing has to be saved to resume.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .batches import Batch, Examples

LengthGroups = Literal["step", "epoch"]
# With "epoch", examples are sorted by length inside groups of this many steps: large enough to leave almost no padding,
# small enough that the order of an epoch stays random.
STEPS_PER_LENGTH_GROUP = 50


@dataclass(frozen=True)
class Share:
    """Which part of every step this process does."""

    process_index: int = 0
    num_processes: int = 1


@dataclass(frozen=True)
class Step:
    """One optimizer step of one process: its micro-batches and, for error reports, the examples in them."""

    batches: list[Batch]
    indices: list[np.ndarray]


class TrainingLoader:
    """Yields one `Step` for each optimizer step of an epoch.

    `batch_size` counts the examples of a step over all processes, `micro_batch_size` those of one forward pass on
    one process; accumulation follows from the two. `group_by_length` "step" draws a step at random and sorts it, so
    that its micro-batches hold examples of similar length; "epoch" makes whole steps of similar length, which leaves
    the least padding, but a step's gradient then speaks for short or for long examples only.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        micro_batch_size: int | None,
        share: Share,
        seed: int,
        group_by_length: LengthGroups = "epoch",
    ) -> None:
        if len(examples.lengths) == 0:
            raise ValueError("there is nothing to train on: the training part of the split is empty (--data.*)")
        self.examples, self.batch_size, self.share, self.seed = examples, batch_size, share, seed
        self.group_by_length = group_by_length
        per_process = math.ceil(batch_size / share.num_processes)
        self.micro_batch_size = min(micro_batch_size or per_process, per_process)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples.lengths) / self.batch_size)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the example indices of every step of `epoch`, longest examples first within a step."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.examples.lengths))
        if self.group_by_length == "step":
            return [self._sort(step) for step in _cut(order, self.batch_size)]
        groups = _cut(order, self.batch_size * STEPS_PER_LENGTH_GROUP)
        steps = [step for group in groups for step in _cut(self._sort(group), self.batch_size)]
        return [steps[i] for i in random.permutation(len(steps))]

    def _sort(self, indices: np.ndarray) -> np.ndarray:
        """Return the longest examples first."""
        return indices[np.argsort(-self.examples.lengths[indices], kind="stable")]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Step]:
        """Yield the steps of `epoch` from `first_step` on; the next one is collated while the current one trains."""
        plan = self.plan(epoch)
        with ThreadPoolExecutor(max_workers=1) as worker:
            ahead = range(first_step, min(first_step + 2, len(plan)))
            pending = [worker.submit(self._collate, plan[i], epoch, i) for i in ahead]
            for i in range(first_step, len(plan)):
                yield pending.pop(0).result()
                if i + 2 < len(plan):
                    pending.append(worker.submit(self._collate, plan[i + 2], epoch, i + 2))

    def _collate(self, step: np.ndarray, epoch: int, step_in_epoch: int) -> Step:
        share, progress = self.share, epoch + step_in_epoch / self.steps_per_epoch
        parts = _cut(step, self.micro_batch_size)
        mine = parts[share.process_index :: share.num_processes]
        batches = [self.examples.collate(part, epoch, progress) for part in mine]
        if len(batches) < math.ceil(len(parts) / share.num_processes):
            # Every process must run the same number of passes, or collective operations would wait for ever.
            batches.append(self.examples.collate(step[:1], epoch, progress).muted())
        return Step(batches, mine)


class EvaluationLoader:
    """Yields this process's share of the evaluation batches, longest first.

    Every process gets as many batches as the others, and of as many rows, since a forward pass may be collective, and
    how many are made may depend on the rows. Where rows or batches do not divide evenly some are repeated, alike on any
    number of processes, and the evaluator drops what comes twice.
    """

    def __init__(self, examples: Examples, batch_size: int, share: Share, device: torch.device) -> None:
        self.examples, self.batch_size, self.share, self.device = examples, batch_size, share, device

    def __iter__(self) -> Iterator[Batch]:
        order = np.argsort(-self.examples.lengths, kind="stable")
        batches = _cut(order, self.batch_size)
        processes = self.share.num_processes
        if len(batches) > 1:
            batches[-1] = order[-self.batch_size :]
        batches += [batches[i % len(batches)] for i in range(-len(batches) % processes)]
        for indices in batches[self.share.process_index :: processes]:
            yield self.examples.collate(indices, 0).to(self.device)


def padding_share(lengths: np.ndarray, plan: list[np.ndarray], micro_batch_size: int) -> float:
    """Return the share of padding among the tokens of an epoch, 0 to 1."""
    real = padded = 0
    for step in plan:
        for part in _cut(step, micro_batch_size):
            real += int(lengths[part].sum())
            padded += int(lengths[part].max()) * len(part)
    return 1 - real / padded


def _cut(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Return pieces of `size`, the last one of what is left."""
    return np.split(indices, range(size, len(indices), size))
