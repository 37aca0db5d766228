"""Lists of candidates: who is in them, what order says, and which texts stand beside them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batches import NO_LABEL
from data.candidate_lists import EvaluationLists, TextVectors, TrainingLists
from data.candidate_store import CandidateStore, training_cuts
from data.config import DataConfig
from data.descriptions import Descriptions, DescriptionSettings
from data.prompt_rows import PromptSettings, evaluation_rows, response_rows
from data.sources import read
from data.splits import split

SAMPLE = DataConfig(source="sample", sample_users=20, sample_series=30)
HISTORY = PromptSettings(history_length=5)


@pytest.fixture(scope="module")
def data():
    interactions = read(SAMPLE)
    return interactions.catalog, split(interactions, SAMPLE)


@pytest.fixture(scope="module")
def texts(data) -> TextVectors:
    """Vectors that say which text they are of."""
    catalog, parts = data
    found = Descriptions.of_templates(parts, catalog, DescriptionSettings(profile_every=4))
    items, users = (np.arange(len(t), dtype=np.float16)[:, None] for t in (found.item_texts, found.user_texts))
    return TextVectors(found, items, users)


def test_a_list_holds_the_target_once_among_items_not_met(data, texts: TextVectors) -> None:
    _, parts = data
    rows = response_rows(parts, HISTORY)
    lists = TrainingLists(parts, rows, 12, 3, texts)
    indices = np.arange(len(lists.lengths))
    batch = lists.collate(indices, 0)
    assert batch.answers is not None
    assert batch.count == len(indices) == len(rows.user)
    answered = batch.candidates.gather(1, batch.answers[:, None])[:, 0].tolist()
    for i, (user, position) in enumerate(zip(rows.user, rows.position, strict=True)):
        candidates = batch.candidates[i].tolist()
        assert answered[i] == parts.history(user, position + 1)[-1]
        assert len({*candidates}) == 12
        assert not {*candidates} & {*parts.history(user, position).tolist()} - {answered[i]}
        assert (
            batch.history.items[i, : batch.history.lengths[i]].tolist() == parts.history(user, position)[-5:].tolist()
        )
    places = np.bincount(batch.answers, minlength=12) / len(indices)
    assert places.max() < 0.2, "the target's place would tell it"
    assert torch.equal(lists.collate(indices[:7], 0).candidates, batch.candidates[:7])
    assert not torch.equal(lists.collate(indices[:7], 1).candidates, batch.candidates[:7])
    assert (batch.muted().answers == NO_LABEL).all()


def test_no_text_has_read_the_target_or_what_follows_it(data, texts: TextVectors) -> None:
    _, parts = data
    rows = response_rows(parts, HISTORY)
    for phase in (None, "valid", "test"):
        asked = rows if phase is None else evaluation_rows(parts, HISTORY, phase)
        batch = TrainingLists(parts, asked, 12, 3, texts).batch(
            np.arange(len(asked.user)), np.ones((len(asked.user), 1))
        )
        assert batch.texts is not None
        row = batch.texts[:, 0, 0].long().numpy()
        as_of = texts.descriptions.as_of[row]
        assert (as_of <= asked.position).all()
        assert (as_of <= parts.train_end[asked.user]).all()
        newest = np.minimum(asked.position, parts.train_end[asked.user])
        if phase is None:
            assert (as_of == newest // 4 * 4).all()
        else:
            assert (as_of == newest).all()
        assert torch.equal(batch.texts[:, 1:, 0].long(), batch.history.items)


def test_cuts_draw_positions_of_each_user_anew(data) -> None:
    _, parts = data
    lists = TrainingLists(parts, response_rows(parts, HISTORY), 12, 3, None, cuts=6)
    assert len(lists.lengths) == 6 * parts.num_users
    for epoch in (0, 1):
        batch = lists.collate(np.arange(len(lists.lengths)), epoch)
        assert batch.texts is None
        for user, histories in enumerate(batch.history.items.split(6)):
            spans = {tuple(parts.history(user, p)[-5:]) for p in range(1, parts.train_end[user])}
            assert {tuple(h[h > 0].tolist()) for h in histories} <= spans
    again = lists.collate(np.arange(len(lists.lengths)), 0)
    assert not torch.equal(again.history.items, batch.history.items)


def test_a_retrievers_lists_keep_their_order_and_rows_without_the_target_are_left_out(data) -> None:
    _, parts = data
    rows, cuts = response_rows(parts, HISTORY), training_cuts(parts)
    targets = parts.items[parts.offsets[cuts.user] + cuts.position]
    items = np.column_stack([targets % parts.num_items + 1, targets, (targets + 1) % parts.num_items + 1])
    items[::3, 1] = (targets[::3] + 2) % parts.num_items + 1
    found = CandidateStore(items.astype(np.int32), np.zeros(items.shape, np.float32))
    lists = TrainingLists(parts, rows, 3, 0, None, found=found)
    kept = np.flatnonzero(np.arange(len(targets)) % 3)
    assert len(lists.lengths) == len(kept)
    batch = lists.collate(np.arange(len(kept)), 5)
    assert batch.candidates.tolist() == items[kept].tolist()
    assert (batch.answers == 1).all()
    with pytest.raises(ValueError, match=r"no list of --method.retriever holds its target"):
        TrainingLists(parts, rows, 3, 0, None, found=replace(found, items=np.zeros_like(found.items)))


def test_evaluation_lists_keep_the_order_they_are_given(data) -> None:
    _, parts = data
    candidates = np.random.default_rng(0).integers(1, parts.num_items + 1, (len(parts.test), 9))
    batch = EvaluationLists(parts, "test", 5, candidates, None).collate(np.array([4, 2]))
    assert batch.candidates.tolist() == candidates[[4, 2]].tolist()
    assert batch.row is not None
    assert batch.row.tolist() == [4, 2]
    user, position = parts.test.user[4], parts.test.position[4]
    assert batch.history.items[0].tolist() == parts.history(user, position)[-5:].tolist()
