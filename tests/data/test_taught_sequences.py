"""Every label of a training batch has its own row of the teacher's lists, and no row is about a held-out event."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.candidate_store import CandidateStore, cut_rows, training_cuts
from data.config import DataConfig
from data.negatives import UniformNegatives
from data.sources import read
from data.splits import Split, split
from data.taught_sequences import TaughtBatch, TaughtSequences
from data.title_tokens import ranges

K, WINDOW = 3, 8


@pytest.fixture(scope="module")
def parts() -> Split:
    config = DataConfig(source="sample", sample_users=30, sample_series=20)
    return split(read(config), config)


def store_of(parts: Split) -> CandidateStore:
    """Lists whose best item is the event that was asked for, or the one before it for users with an odd number."""
    cuts = training_cuts(parts)
    asked = parts.items[parts.offsets[cuts.user] + cuts.position - cuts.user % 2]
    items = 1 + (asked[:, None] - 1 + np.arange(K)) % parts.num_items
    scores = np.tile(-np.arange(K, dtype=np.float32), (len(items), 1)) * (1 + cuts.position[:, None])
    return CandidateStore(items.astype(np.int32), scores.astype(np.float32))


def taught(
    parts: Split, windows: str = "all", negatives: bool = True, rows: np.ndarray | None = None
) -> TaughtSequences:
    """Of these rows, or all."""
    drawn, store = UniformNegatives(parts, 1, seed=5) if negatives else None, store_of(parts)
    rows = np.arange(len(store.items)) if rows is None else rows
    lists = CandidateStore(store.items[rows], store.scores[rows])
    return TaughtSequences(parts, WINDOW, windows, None, rows, lists, drawn)


@pytest.mark.parametrize("windows", ["last", "all"])
def test_every_label_has_the_list_of_its_own_history(parts: Split, windows: str) -> None:
    examples = taught(parts, windows)
    indices = np.random.default_rng(0).permutation(len(examples.lengths))[:25]
    batch = examples.collate(indices, 0)
    assert batch.labelled is not None
    assert batch.targets is not None
    assert batch.candidates is not None
    assert batch.distances is not None
    assert batch.target_distances is not None
    row = batch.labelled // batch.items.shape[1]
    odd = torch.from_numpy(examples.spans[indices, 0])[row] % 2 == 1
    read_last = batch.items.flatten()[batch.labelled]
    assert odd.any()
    assert not odd.all()
    assert batch.candidates[:, 0].tolist() == torch.where(odd, read_last, batch.targets).tolist()
    # The teacher is surer, the longer the history: its scores are that much apart.
    first, slot = torch.from_numpy(examples.spans[indices, 1])[row], batch.labelled % batch.items.shape[1]
    position = first + slot + 1
    said = -torch.arange(K) * (1 + position[:, None]).float()
    torch.testing.assert_close(batch.distances, -said.log_softmax(1))
    torch.testing.assert_close((-batch.distances).exp().sum(1), torch.ones(len(position)))
    known = batch.candidates == batch.targets[:, None]
    assert torch.equal(batch.target_distances.isfinite(), known.any(1))
    torch.testing.assert_close(batch.target_distances[~odd], batch.distances[~odd, 0])


def test_labels_without_a_list_stand_behind_those_with_one(parts: Split) -> None:
    rows = np.sort(np.random.default_rng(1).permutation(len(training_cuts(parts)))[:150])
    whole, some, indices = taught(parts), taught(parts, rows=rows), np.array([3, 11, 0, 19])
    every, batch = whole.collate(indices, 0), some.collate(indices, 0)
    assert batch.candidates is not None
    assert every.candidates is not None
    assert batch.count == every.count
    told = len(batch.candidates)
    assert 0 < told < batch.count
    user, start, end = whole.spans[indices].T
    asked = cut_rows(parts, np.repeat(user, end - start), ranges(start + 1, end - start))
    first = np.flatnonzero(np.isin(asked, rows))
    order = np.concatenate([first, np.flatnonzero(~np.isin(asked, rows))])
    for name in ("labelled", "targets"):
        assert torch.equal(getattr(batch, name), getattr(every, name)[order])
    for name in ("candidates", "distances", "target_distances", "label_negatives"):
        assert torch.equal(getattr(batch, name), getattr(every, name)[first]), name


def test_no_held_out_event_is_asked_for(parts: Split) -> None:
    """Other validation and test targets change no batch, and a training part that claims them is refused."""
    held_out = np.concatenate([parts.offsets[t.user] + t.position for t in (parts.valid, parts.test)])
    items = parts.items.copy()
    items[held_out] = 1 + items[held_out] % parts.num_items
    others = replace(parts, items=items)
    before, after = taught(parts), taught(others)
    everything = np.arange(len(before.lengths))
    for name, tensor in vars(before.collate(everything, 1)).items():
        other = getattr(after.collate(everything, 1), name)
        assert torch.equal(tensor, other) if isinstance(tensor, torch.Tensor) else tensor == other, name
    claimed = replace(parts, train_end=parts.train_end + 1)
    with pytest.raises(ValueError, match="and training has"):
        TaughtSequences(parts, WINDOW, "all", None, np.arange(len(training_cuts(claimed))), store_of(claimed), None)
    before.split = replace(parts, train_end=parts.train_end - 1)
    with pytest.raises(AssertionError, match="held-out"):
        before.collate(everything, 0)


def test_each_label_has_an_unseen_negative_that_seed_epoch_and_example_tell(parts: Split) -> None:
    examples = taught(parts)
    together = examples.collate(np.array([4, 9]), 3)
    alone = [examples.collate(np.array([i]), 3) for i in (4, 9)]
    assert together.label_negatives is not None
    negatives = [batch.label_negatives for batch in alone]
    assert torch.equal(together.label_negatives, torch.cat(negatives))  # type: ignore[arg-type]
    for index, drawn in zip((4, 9), negatives, strict=True):
        assert drawn is not None
        assert len(drawn) == examples.lengths[index]
        assert drawn.min() > 0
        assert not np.isin(drawn, parts.training_items(int(examples.spans[index, 0]))).any()
    other_epoch = examples.collate(np.array([4, 9]), 4).label_negatives
    assert other_epoch is not None
    assert not torch.equal(together.label_negatives, other_epoch)
    assert taught(parts, negatives=False).collate(np.array([4]), 0).label_negatives is None


def test_a_muted_batch_keeps_its_histories_and_loses_its_lists(parts: Split) -> None:
    batch = taught(parts).collate(np.arange(3), 0).to(torch.device("cpu"))
    assert isinstance(batch, TaughtBatch)
    muted = batch.muted()
    assert torch.equal(muted.items, batch.items)
    assert muted.count == 0
    lists = (muted.labelled, muted.targets, muted.candidates, muted.distances, muted.target_distances)
    assert all(tensor is not None and not len(tensor) for tensor in (*lists, muted.label_negatives))
