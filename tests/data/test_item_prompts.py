"""Rows of item prompts: where vectors stand, what is read, and that every training item is a label once."""

import numpy as np
import pytest

from data.cold_items import with_cold_items
from data.config import DataConfig
from data.item_examples import EvaluationItemPrompts, TrainingItemPrompts
from data.item_prompts import ItemPromptLayout, ItemPromptSettings
from data.negatives import SharedNegatives
from data.prompts import title_texts
from data.sources import read
from data.splits import split
from data.title_tokens import encode
from models.backbone import BackboneConfig, load_tokenizer

SAMPLE = DataConfig(source="sample", sample_users=40, sample_series=15)
SETTINGS = ItemPromptSettings(instruction="Read this:\n", response="\nNext:\n", max_history=6)


@pytest.fixture(scope="module")
def sample():
    return read(SAMPLE).catalog, split(read(SAMPLE), SAMPLE)


@pytest.fixture(scope="module")
def tokenizer(sample):
    catalog, _ = sample
    return load_tokenizer(BackboneConfig(), [*title_texts(catalog)[1:], SETTINGS.instruction, SETTINGS.response])


def layout_of(sample, tokenizer, *, causal=True, shares_prefix=True, **settings):
    own = ItemPromptSettings(**vars(SETTINGS) | settings)
    return own, ItemPromptLayout.build(tokenizer, sample[0], own, causal=causal, shares_prefix=shares_prefix)


def labels_of(sample, examples):
    """(number of training events that are labels, batch of everything)."""
    batch = examples.collate(np.arange(len(examples.lengths)), epoch=0)
    assert batch.count == len(batch.targets) == len(batch.labelled)
    return batch


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("mode", ["positions", "prefix"])
@pytest.mark.parametrize("first", [False, True])
def test_every_training_item_is_a_label_once(sample, tokenizer, mode, titles, first):
    settings, layout = layout_of(sample, tokenizer, mode=mode, titles=titles, empty_history=first, max_targets=500)
    batch = labels_of(sample, TrainingItemPrompts(sample[1], layout, settings))
    items = [sample[1].training_items(user) for user in range(sample[1].num_users)]
    expected = np.concatenate([i if first else i[1:] for i in items])
    assert np.array_equal(np.sort(batch.targets.numpy()), np.sort(expected))


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("mode", ["positions", "prefix"])
@pytest.mark.parametrize("shares_prefix", [False, True])
def test_a_row_spells_its_prompt(sample, tokenizer, mode, titles, shares_prefix):
    catalog, parts = sample
    _, layout = layout_of(sample, tokenizer, mode=mode, titles=titles, shares_prefix=shares_prefix)
    examples = EvaluationItemPrompts(parts, "test", layout, max_history=4)
    batch = examples.collate(np.array([0, 3]))
    before, after = encode(tokenizer, [SETTINGS.instruction, SETTINGS.response])
    vectors = iter(zip(batch.item_slots.tolist(), batch.slot_items.tolist(), strict=True))
    for i, case in enumerate((0, 3)):
        history = parts.history(parts.test.user[case], parts.test.position[case])[-4:]
        expected: list[int] = before[-1:] if shares_prefix else list(before)
        for item in history:
            slot, slot_item = next(vectors)
            assert (slot, slot_item) == (i * batch.input_ids.shape[1] + len(expected), item)
            expected.append(0)
            if titles:
                expected += encode(tokenizer, [f" ({catalog.titles[item]}),"])[0]
        expected += after if mode == "prefix" else []
        assert batch.input_ids[i, : len(expected)].tolist() == expected
        assert not batch.input_ids[i, len(expected) :].any()
        assert batch.labelled[i] == i * batch.input_ids.shape[1] + len(expected) - 1
        assert examples.lengths[case] == len(expected)
    assert (batch.prefix_ids is not None) == shares_prefix
    if shares_prefix:
        assert batch.prefix_ids.tolist() == before[:-1]


def test_a_position_is_read_where_its_item_ends(sample, tokenizer):
    settings, layout = layout_of(sample, tokenizer, mode="positions", titles=True)
    examples = TrainingItemPrompts(sample[1], layout, settings)
    batch = examples.collate(np.array([0]), epoch=0)
    comma = batch.input_ids.flatten()[batch.labelled[:-1] + 1]
    assert (comma == 0).all()  # behind each but the last stands the next item's vector
    assert set((batch.labelled[:-1] + 1).tolist()) <= set(batch.item_slots.tolist())


def test_a_user_without_history_is_read_at_the_instruction(sample, tokenizer):
    _, layout = layout_of(sample, tokenizer)
    batch, _, row_ends = layout.batch([np.array([], np.int64), np.array([5, 6])])
    assert row_ends.tolist() == [0, 5]
    assert batch.item_slots.tolist() == [4, 5]


def test_a_prompt_a_target_may_end_without_response(sample, tokenizer):
    settings, layout = layout_of(sample, tokenizer, mode="prefix", response="")
    examples = TrainingItemPrompts(sample[1], layout, settings)
    assert examples.collate(np.arange(5), epoch=0).count == 5


def test_published_padding_stands_between_instruction_and_items(sample, tokenizer):
    _, layout = layout_of(sample, tokenizer, mode="prefix", published_padding=True)
    batch, _, row_ends = layout.batch([np.array([7]), np.array([], np.int64)])
    before, after = len(layout.before), len(layout.after)
    assert batch.input_ids.shape[1] == before + 2 + after
    assert batch.attention_mask[0].tolist() == [1] * before + [0] + [1] * (1 + after)
    assert batch.attention_mask[1].tolist() == [1] * before + [0, 0] + [1] * after
    assert batch.item_slots.tolist() == [before + 1]
    assert row_ends.tolist() == [before + 1 + after, 2 * (before + 2 + after) - 1]


@pytest.mark.parametrize(
    ("settings", "causal", "flag"),
    [
        ({"mode": "positions"}, False, "--backbone.causal true"),
        ({"mode": "positions", "published_padding": True}, True, "--method.prompts.mode prefix"),
        ({"instruction": ""}, True, "--method.prompts.bos"),
    ],
)
def test_settings_that_do_not_go_together_name_a_flag(sample, tokenizer, settings, causal, flag):
    with pytest.raises(ValueError, match=flag):
        layout_of(sample, tokenizer, causal=causal, **settings)


def test_shared_negatives_come_as_often_as_they_say(sample):
    _, parts = sample
    negatives = SharedNegatives(parts, 20_000, alpha=0.5, seed=1)
    items, log_expected = negatives.draw(example=3, epoch=2)
    again, _ = negatives.draw(example=3, epoch=2)
    assert np.array_equal(items, again)
    assert not np.array_equal(items, negatives.draw(example=4, epoch=2)[0])
    share = np.bincount(items, minlength=parts.num_items + 1) / len(items)
    q = np.zeros(parts.num_items + 1)
    q[items] = np.exp(log_expected) / 20_000
    assert np.isclose(q.sum(), 1, atol=0.02)
    assert np.abs(share - q).max() < 5e-3
    counts = parts.item_counts()
    assert np.isclose(q[items[0]] / q[items[1]], np.sqrt(max(counts[items[0]], 1) / max(counts[items[1]], 1)))


def test_shared_negatives_are_never_cold(sample):
    catalog, parts = sample
    cold = with_cold_items(parts, catalog, 0.2, seed=0)
    items, _ = SharedNegatives(cold, 20_000, alpha=0.0, seed=1).draw(example=0, epoch=0)
    assert len(cold.cold_items)
    assert set(items) == set(range(1, parts.num_items + 1)) - set(cold.cold_items)


def test_shared_negatives_estimate_the_sum_over_the_catalogue(sample):
    _, parts = sample
    values = np.random.default_rng(0).exponential(size=parts.num_items + 1)
    draws = [SharedNegatives(parts, 64, alpha=0.5, seed=1).draw(example, epoch=0) for example in range(500)]
    estimates = [(values[items] / np.exp(log_expected)).sum() for items, log_expected in draws]
    assert np.mean(estimates) == pytest.approx(values[1:].sum(), rel=4 * np.std(estimates) / values.sum() / 500**0.5)
