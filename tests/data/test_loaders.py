"""Loaders: every example once, the same step on any number of processes, resumable, with little padding."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import EvaluationSequences, SequenceBatch, TrainingSequences
from data.config import DataConfig
from data.loaders import (
    STEPS_PER_LENGTH_GROUP,
    EvaluationLoader,
    LengthGroups,
    Share,
    Step,
    TrainingLoader,
    padding_share,
)
from data.negatives import UniformNegatives
from data.sources import read
from data.splits import Split, Targets, split

WINDOW = 20


class Numbered:
    """Examples of given lengths that collate to their own numbers."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> SequenceBatch:
        items = torch.from_numpy(np.asarray(indices))[:, None] + 1
        lengths = torch.from_numpy(self.lengths[indices])
        labelled = torch.arange(int(lengths.sum()))
        return SequenceBatch(items, lengths, labelled, labelled + 1, row=items[:, 0] - 1, count=len(labelled))


def numbered(count: int) -> Numbered:
    return Numbered(np.random.default_rng(5).integers(1, 40, count))


def loader(
    examples: Numbered | TrainingSequences,
    batch_size: int = 8,
    micro_batch_size: int | None = None,
    share: Share | None = None,
    seed: int = 1,
    group_by_length: LengthGroups = "epoch",
) -> TrainingLoader:
    return TrainingLoader(examples, batch_size, micro_batch_size, share or Share(), seed, group_by_length)


def examples_of(step: Step) -> list[int]:
    """The examples in a step's batches that carry labels."""
    return [int(item) - 1 for batch in step.batches if batch.count for item in batch.items.flatten()]


def fields(batch: SequenceBatch) -> list[object]:
    return [value.tolist() if isinstance(value, Tensor) else value for value in vars(batch).values()]


@pytest.fixture(scope="module")
def sample() -> Split:
    config = DataConfig(source="sample", sample_users=90)
    return split(read(config), config)


# --- Training ---


class Timed(Numbered):
    """Examples that remember when they were asked for."""

    def __init__(self, lengths: np.ndarray) -> None:
        super().__init__(lengths)
        self.asked: list[tuple[int, float]] = []

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> SequenceBatch:
        self.asked.append((epoch, progress))
        return super().collate(indices, epoch, progress)


@pytest.mark.parametrize("first_step", [0, 2])
def test_every_batch_knows_how_far_training_is(first_step: int) -> None:
    examples = Timed(np.arange(1, 41))  # 5 steps of 8 examples, each in two micro-batches
    list(loader(examples, micro_batch_size=4).epoch(3, first_step))
    expected = [(3, 3 + step / 5) for step in range(first_step, 5) for _ in range(2)]
    assert examples.asked == expected


@pytest.mark.parametrize("group_by_length", ["step", "epoch"])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 8 * STEPS_PER_LENGTH_GROUP + 3])
def test_every_example_comes_exactly_once_an_epoch(count: int, group_by_length: LengthGroups) -> None:
    made = loader(numbered(count), group_by_length=group_by_length)
    steps = list(made.epoch(0))
    assert len(steps) == made.steps_per_epoch == -(-count // 8)
    assert Counter(i for step in steps for i in examples_of(step)) == Counter(range(count))
    for step in steps:
        assert examples_of(step) == np.concatenate(step.indices).tolist(), "error reports name the right examples"


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [examples_of(step) for step in loader(numbered(50), seed=seed).epoch(epoch)]

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("processes", "micro_batch_size"), [(2, 8), (2, 3), (3, None), (4, 2)])
def test_processes_and_accumulation_share_the_same_steps(processes: int, micro_batch_size: int | None) -> None:
    whole = list(loader(numbered(53), batch_size=16).epoch(2))
    accumulated = list(loader(numbered(53), batch_size=16, micro_batch_size=micro_batch_size).epoch(2))
    shares = [Share(index, processes) for index in range(processes)]
    spread = [
        list(loader(numbered(53), batch_size=16, micro_batch_size=micro_batch_size, share=share).epoch(2))
        for share in shares
    ]
    for one, accumulating, *parts in zip(whole, accumulated, *spread, strict=True):
        assert len(one.batches) == 1
        assert sorted(examples_of(accumulating)) == sorted(examples_of(one))
        assert sorted(i for part in parts for i in examples_of(part)) == sorted(examples_of(one))
        # Collective operations pair up: all processes run the same number of passes.
        assert len({len(part.batches) for part in parts}) == 1
        # Muted batches fill in, and neither they nor the shares change what the loss is divided by.
        assert sum(batch.count for part in parts for batch in part.batches) == one.batches[0].count
        if micro_batch_size:
            assert max(len(batch.items) for part in parts for batch in part.batches) <= micro_batch_size


def test_two_processes_and_two_micro_batches_see_the_same_batches(sample: Split) -> None:
    """Not only the same examples: the same tensors, negatives included."""

    def steps(share: Share) -> list[Step]:
        negatives = UniformNegatives(sample, 4, seed=0)
        examples = TrainingSequences(sample, WINDOW, negatives=negatives)
        return list(loader(examples, batch_size=32, micro_batch_size=16, share=share).epoch(1))

    for accumulated, first, second in zip(steps(Share()), steps(Share(0, 2)), steps(Share(1, 2)), strict=True):
        spread = [batch for batch in (*first.batches, *second.batches) if batch.count]
        assert [fields(batch) for batch in accumulated.batches] == [fields(batch) for batch in spread]


def test_a_process_without_a_share_runs_a_muted_batch() -> None:
    last = list(loader(numbered(17), batch_size=8, share=Share(1, 2), group_by_length="step").epoch(0))[-1]
    assert [batch.count for batch in last.batches] == [0]
    assert last.indices == []


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_resumes_at_any_step(processes: int) -> None:
    share = Share(processes - 1, processes)
    whole = [list(map(fields, step.batches)) for step in loader(numbered(53), share=share).epoch(3)]
    for first in range(len(whole) + 1):
        resumed = loader(numbered(53), share=share).epoch(3, first)
        assert [list(map(fields, step.batches)) for step in resumed] == whole[first:]


@pytest.mark.parametrize(("source", "batch_size"), [("ml-100k", 64), ("ml-1m", 128)])
def test_length_groups_leave_little_padding(data_root: Path, source: str, batch_size: int) -> None:
    config = DataConfig(source=source, root=data_root)
    lengths = TrainingSequences(split(read(config), config), window=200).lengths
    by_epoch, by_step = (
        loader(Numbered(lengths), batch_size=batch_size, group_by_length=group).plan(0) for group in ("epoch", "step")
    )
    assert padding_share(lengths, by_epoch, batch_size) < 0.1
    # Steps are drawn at random there, so it takes small micro-batches.
    assert padding_share(lengths, by_step, batch_size // 8) < 0.15 < padding_share(lengths, by_step, batch_size)


def test_a_step_drawn_at_random_has_its_longest_examples_first() -> None:
    examples = numbered(100)
    steps = loader(examples, group_by_length="step").plan(0)
    assert all((np.diff(examples.lengths[step]) <= 0).all() for step in steps)
    means = [examples.lengths[step].mean() for step in steps[:-1]]
    assert np.std(means) < examples.lengths.std() / 2, "every step has long and short ones"


def test_padding_share_counts_slots() -> None:
    lengths = np.array([4, 2, 1, 1])
    assert padding_share(lengths, [np.array([0, 1]), np.array([2, 3])], 2) == pytest.approx(2 / 10)
    assert padding_share(lengths, [np.array([0, 1, 2, 3])], 1) == 0


def test_steps_of_all_lengths_are_mixed_over_an_epoch() -> None:
    """Grouping must not turn an epoch into a walk from long to short."""
    examples = Numbered(np.arange(1, 8 * STEPS_PER_LENGTH_GROUP + 1))
    means = [examples.lengths[step].mean() for step in loader(examples).plan(0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        loader(Numbered(np.zeros(0, dtype=np.int64)))


def test_a_failing_collator_is_not_swallowed_by_the_thread() -> None:
    class Broken(Numbered):
        def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> SequenceBatch:
            raise RuntimeError("broken example")

    with pytest.raises(RuntimeError, match="broken example"):
        next(loader(Broken(np.ones(9, dtype=np.int64))).epoch(0))


# --- Evaluation ---


@pytest.mark.parametrize("count", [1, 8, 9, 41])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_evaluation_covers_every_row_in_equally_many_equal_batches(count: int, processes: int) -> None:
    examples = numbered(count)
    shares = [
        [batch.row for batch in EvaluationLoader(examples, 8, Share(index, processes), torch.device("cpu"))]
        for index in range(processes)
    ]
    sizes = [[len(row) for row in rows] for rows in shares]
    assert all(size == sizes[0] for size in sizes), "a forward pass may be collective, and their number go by the rows"
    rows = torch.cat([row for rows in shares for row in rows])
    assert set(rows.tolist()) == set(range(count))
    if processes == 1:
        assert len(rows) - count in range(8)


def test_evaluation_batches_are_the_same_on_any_number_of_processes(sample: Split) -> None:
    """Batches of other rows would be padded otherwise, and floating-point sums would differ in the last bit."""
    examples = EvaluationSequences(sample, "test", WINDOW)

    def batches(processes: int) -> set[str]:
        shares = [Share(index, processes) for index in range(processes)]
        made = [batch for share in shares for batch in EvaluationLoader(examples, 16, share, torch.device("cpu"))]
        return {str(fields(batch)) for batch in made}

    assert batches(1) == batches(2) == batches(4)


def test_evaluation_starts_with_the_longest_histories(sample: Split) -> None:
    """If the memory does not suffice, that shows in the first batch."""
    short = replace(sample, test=Targets(sample.test.user, np.arange(len(sample.test.user)) % 15 + 1))
    examples = EvaluationSequences(short, "test", WINDOW)
    lengths = [int(batch.lengths.max()) for batch in EvaluationLoader(examples, 8, Share(), torch.device("cpu"))]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
