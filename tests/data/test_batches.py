"""What a collated batch holds: every event trains what comes next, exactly once, and prompts say the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data.batches import (
    NO_LABEL,
    EvaluationPrompts,
    EvaluationSequences,
    PromptBatch,
    TrainingPrompts,
    TrainingSequences,
    padded_length,
)
from data.config import DataConfig
from data.interactions import Catalog
from data.negatives import UniformNegatives
from data.prompt_rows import PromptSettings
from data.prompts import template_by_name, title_texts
from data.sources import read
from data.splits import Split, split
from data.title_tokens import TitleTokens
from data.tokenized import build_prompts, shared_start
from models.backbone import BackboneConfig, load_tokenizer

WINDOW = 10
SAMPLE = DataConfig(source="sample", sample_users=40, sample_series=15)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return read(SAMPLE).catalog


@pytest.fixture(scope="module")
def sample() -> Split:
    return split(read(SAMPLE), SAMPLE)


def everything(examples) -> np.ndarray:
    return np.arange(len(examples.lengths))


# --- Sequences ---


@pytest.mark.parametrize("windows", ["last", "all"])
def test_training_windows_name_the_next_event(sample: Split, windows: str) -> None:
    examples = TrainingSequences(sample, WINDOW, windows)
    batch = examples.collate(everything(examples), 0)
    assert batch.labelled is not None
    assert batch.targets is not None
    assert batch.count == len(batch.targets) == len(batch.labelled) == int(batch.lengths.sum())
    assert batch.items.shape == (len(examples.lengths), WINDOW)
    rows = batch.labelled // WINDOW
    trained = []  # (user, position of the target in the user's sequence)
    for row, (user, start, end) in enumerate(examples.spans):
        sequence, length = sample.training_items(user), end - start
        assert batch.lengths[row] == length <= WINDOW
        assert batch.items[row].tolist() == [*sequence[start:end], *[0] * (WINDOW - length)]
        assert batch.targets[rows == row].tolist() == sequence[start + 1 : end + 1].tolist()
        assert batch.labelled[rows == row].tolist() == [row * WINDOW + slot for slot in range(length)]
        trained += [(user, position) for position in range(start + 1, end + 1)]
    assert len(trained) == len(set(trained)), "no event is a label twice"
    kept = {"last": WINDOW, "all": 10**9}[windows]
    expected = [
        (user, position)
        for user in range(sample.num_users)
        for position in range(max(1, sample.train_end[user] - kept), sample.train_end[user])
    ]
    assert sorted(trained) == expected


def test_users_without_two_training_events_are_left_out() -> None:
    """The first event of a user has nothing before it, so one training event alone teaches nothing."""
    config = DataConfig(source="sample", sample_users=5)
    full = split(read(config), config)
    short = Split(**{**vars(full), "train_end": np.array([0, 1, 2, 3, 4])})
    for windows in ("last", "all"):
        examples = TrainingSequences(short, WINDOW, windows)
        assert examples.spans.tolist() == [[2, 0, 1], [3, 0, 2], [4, 0, 3]]


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_evaluation_histories_end_before_the_target(sample: Split, phase) -> None:
    examples = EvaluationSequences(sample, phase, WINDOW)
    indices = everything(examples)[::-1].copy()
    batch = examples.collate(indices)
    assert batch.row is not None
    assert batch.row.tolist() == indices.tolist()
    assert batch.targets is None
    targets = sample.targets(phase)
    for row, items, length in zip(indices, batch.items.tolist(), batch.lengths.tolist(), strict=True):
        user, position = targets.user[row], targets.position[row]
        assert items[:length] == sample.history(user, position)[-WINDOW:].tolist()
        assert not any(items[length:])
        assert length == min(position, WINDOW)


def test_a_history_may_be_empty(sample: Split) -> None:
    cold = Split(**{**vars(sample), "test": type(sample.test)(np.array([0, 1]), np.array([0, 0]))})
    batch = EvaluationSequences(cold, "test", WINDOW).collate(np.array([0, 1]))
    assert batch.items.tolist() == [[0], [0]]
    assert batch.lengths.tolist() == [0, 0]


def test_muted_and_moved_batches_keep_their_kind(sample: Split) -> None:
    examples = TrainingSequences(sample, WINDOW, negatives=UniformNegatives(sample, 3, seed=0))
    batch = examples.collate(np.array([0, 1]), 0)
    muted = batch.muted()
    assert muted.targets is not None
    assert muted.labelled is not None
    assert muted.count == len(muted.targets) == len(muted.labelled) == 0
    assert torch.equal(muted.items, batch.items)
    on_meta = batch.to(torch.device("meta"))
    assert all(value.is_meta for value in vars(on_meta).values() if isinstance(value, Tensor))
    assert on_meta.count == batch.count


# --- Negatives ---


def test_negatives_are_distinct_unseen_items(sample: Split) -> None:
    count = 20
    users = np.arange(sample.num_users)
    drawn = UniformNegatives(sample, count, seed=0).draw(users, users, 0)
    assert drawn.shape == (sample.num_users, count)
    assert drawn.min() >= 1
    assert drawn.max() <= sample.num_items
    for user, negatives in zip(users, drawn, strict=True):
        assert len(set(negatives)) == count
        assert not set(negatives) & set(sample.training_items(user))
    # Held-out items are not known in training: leaving them out would tell the model which they are.
    held_out = sample.target_items("test")
    many = [UniformNegatives(sample, count, seed=0).draw(users, users, epoch) for epoch in range(20)]
    assert any((drawn == held_out[:, None]).any() for drawn in many)


def test_negatives_are_uniform_over_unseen_items(sample: Split) -> None:
    negatives = UniformNegatives(sample, 5, seed=0)
    draws = np.concatenate([negatives.draw(np.array([3]), np.array([3]), epoch)[0] for epoch in range(2000)])
    unseen = np.setdiff1d(np.arange(1, sample.num_items + 1), sample.training_items(3))
    frequency = np.bincount(draws, minlength=sample.num_items + 1)[unseen] / len(draws) * len(unseen)
    assert 0.75 < frequency.min() <= frequency.max() < 1.25


def test_negatives_do_not_depend_on_the_batch_that_they_are_in(sample: Split) -> None:
    examples = TrainingSequences(sample, WINDOW, negatives=UniformNegatives(sample, 4, seed=7))
    together = examples.collate(np.array([5, 2, 9]), 1).negatives
    for place, index in enumerate([5, 2, 9]):
        assert torch.equal(examples.collate(np.array([index]), 1).negatives, together[place : place + 1])
    assert not torch.equal(examples.collate(np.array([5, 2, 9]), 2).negatives, together), "each epoch draws anew"
    other = TrainingSequences(sample, WINDOW, negatives=UniformNegatives(sample, 4, seed=8))
    assert not torch.equal(other.collate(np.array([5, 2, 9]), 1).negatives, together)


def test_more_negatives_than_unseen_items_is_an_error(sample: Split) -> None:
    most_seen = max(len(set(sample.training_items(user))) for user in range(sample.num_users))
    UniformNegatives(sample, sample.num_items - most_seen, seed=0)
    with pytest.raises(ValueError, match=r"--method\.num_negatives"):
        UniformNegatives(sample, sample.num_items - most_seen + 1, seed=0)


# --- Prompts ---


@pytest.fixture(scope="module")
def tokenizer(catalog: Catalog) -> PreTrainedTokenizerBase:
    return load_tokenizer(BackboneConfig(), title_texts(catalog))


def training_prompts(
    sample: Split,
    catalog: Catalog,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    mode: str,
    *,
    label_inputs: bool = False,
    label_items: bool = False,
) -> TrainingPrompts:
    template = "dense" if mode == "dense" else "bigrec-movie"
    settings = PromptSettings(template=template, mode=mode, window=8, overlap=3, history_length=4)  # type: ignore[arg-type]
    rows = build_prompts(sample, catalog, tokenizer, settings, "train", cache, False)
    titles = TitleTokens.build(tokenizer, catalog, template_by_name(template))
    return TrainingPrompts(rows, sample, titles, label_inputs=label_inputs, label_items=label_items)


def spread(batch: PromptBatch) -> torch.Tensor:
    """The labels where they stand, [B, L], with NO_LABEL elsewhere."""
    assert batch.labelled is not None
    assert batch.targets is not None
    assert batch.count == len(batch.labelled) == len(batch.labelled.unique())
    labels = torch.full_like(batch.input_ids, NO_LABEL)
    labels.view(-1)[batch.labelled] = batch.targets
    return labels


@pytest.mark.parametrize("mode", ["response", "dense"])
def test_prompt_labels_spell_the_next_titles(sample, catalog, tokenizer, cache, mode: str) -> None:
    examples = training_prompts(sample, catalog, tokenizer, cache, mode)
    items_too = training_prompts(sample, catalog, tokenizer, cache, mode, label_items=True)
    template = template_by_name("dense" if mode == "dense" else "bigrec-movie")
    batch = examples.collate(everything(examples), 0)
    labels, next_items = spread(batch), spread(items_too.collate(everything(examples), 0))
    named = []
    for row, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length), "pads stand on the right"
        starts = (next_items[row] != NO_LABEL).nonzero()[:, 0].tolist()
        # From the first title that is a label on, every token but the last has its successor as label.
        assert labels[row, : starts[0]].eq(NO_LABEL).all()
        assert labels[row, starts[0] : length - 1].tolist() == ids[starts[0] + 1 : length].tolist()
        assert labels[row, length - 1 :].eq(NO_LABEL).all()
        for start, end in zip(starts, [*starts[1:], length - 1], strict=True):
            item = int(next_items[row, start])
            assert tokenizer.decode(ids[start + 1 : end]) == template.response(catalog.titles[item])
            assert ids[end] == tokenizer.eos_token_id
            named.append((int(examples.prompts[row]["user"]), item))
    expected = [(user, item) for user in range(sample.num_users) for item in sample.training_items(user)[1:]]
    assert sorted(named) == sorted(expected), "every training event with a past is named exactly once"


def test_all_rows_begin_with_the_instruction(sample, catalog, tokenizer, cache) -> None:
    rows = training_prompts(sample, catalog, tokenizer, cache, "response").prompts
    shared = shared_start(rows)
    ids = rows["input_ids"]
    assert all(np.array_equal(row[:shared], ids[0][:shared]) for row in ids)
    assert any(row[shared] != ids[0][shared] for row in ids), "and with no token more"
    assert "### Input:\n" in tokenizer.decode(ids[0][:shared])


def test_a_shared_start_ends_before_what_predicts_a_label() -> None:
    rows = {"input_ids": [[7, 8, 9, 10], [7, 8, 9, 11, 12]], "context": [3, 4]}
    assert shared_start(Dataset.from_dict(rows)) == 2
    assert shared_start(Dataset.from_dict({"input_ids": [[7, 8, 9], [6, 8, 9]], "context": [2, 2]})) == 0
    assert shared_start(Dataset.from_dict({"input_ids": [[7, 8]], "context": [1]})) == 0


def test_labels_may_be_items_or_the_prompt_too(sample, catalog, tokenizer, cache) -> None:
    plain = training_prompts(sample, catalog, tokenizer, cache, "dense").collate(np.arange(5), 0)
    items = training_prompts(sample, catalog, tokenizer, cache, "dense", label_items=True).collate(np.arange(5), 0)
    assert 0 < items.count < plain.count
    assert set(items.labelled.tolist()) < set(plain.labelled.tolist()), "where the first token of a title is the next"
    inputs = training_prompts(sample, catalog, tokenizer, cache, "dense", label_inputs=True).collate(np.arange(5), 0)
    real = plain.attention_mask.bool()
    assert inputs.count == int(real.sum()) - 5, "every token but the first of a row is a label"
    assert torch.equal(spread(inputs)[:, :-1][real[:, 1:]], plain.input_ids[:, 1:][real[:, 1:]])


def test_muted_prompts_have_no_labels(sample, catalog, tokenizer, cache) -> None:
    muted = training_prompts(sample, catalog, tokenizer, cache, "dense").collate(np.arange(2), 0).muted()
    assert muted.count == 0
    assert len(muted.labelled) == len(muted.targets) == 0


@pytest.mark.parametrize("phase", ["valid", "test"])
def test_evaluation_prompts_end_where_the_answer_begins(sample, catalog, tokenizer, cache, phase) -> None:
    settings = PromptSettings(template="dense", mode="dense", history_length=4)
    examples = EvaluationPrompts(build_prompts(sample, catalog, tokenizer, settings, phase, cache, False))
    indices = np.array([7, 0, 3])
    batch: PromptBatch = examples.collate(indices)
    assert batch.row is not None
    assert batch.row.tolist() == indices.tolist()
    assert batch.labelled is None
    targets = sample.targets(phase)
    for index, ids, mask in zip(indices, batch.input_ids, batch.attention_mask, strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [0] * (len(ids) - length) + [1] * length, "pads stand on the left"
        assert length == examples.lengths[index]
        text = tokenizer.decode(ids[-length:], skip_special_tokens=True)
        newest = sample.history(targets.user[index], targets.position[index])[-4:]
        shown = [text.index(catalog.titles[item]) for item in newest]
        assert shown == sorted(shown), "oldest first"
        assert catalog.titles[sample.target_items(phase)[index]] not in text


def test_batches_are_padded_to_few_lengths() -> None:
    lengths = [padded_length(longest) for longest in range(1, 513)]
    assert all(longest <= length < 9 / 8 * longest + 1 for longest, length in enumerate(lengths, 1))
    assert len(set(lengths)) == 56
    assert all(lengths[2**power - 1] == 2**power for power in range(10)), "what models have room for"
    assert padded_length(199, 200) == 200 == padded_length(200, 200)
    assert padded_length(150, 200) == 160
    assert padded_length(201, 200) == 201
