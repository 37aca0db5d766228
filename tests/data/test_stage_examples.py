"""Texts of the stages: what is masked, what is held out, and that a batch is a function of (seed, epoch, text)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data.cold_items import with_cold_items
from data.config import DataConfig
from data.corpus import Corpus, CorpusSettings
from data.retrieval_texts import RetrievalTexts
from data.sources import read
from data.splits import split
from data.stage_examples import MaskedTexts, MaskingSettings, WholeTexts, mask_token_id
from models.tiny import TinyConfig, train_tiny_tokenizer

DATA = DataConfig(source="sample", sample_users=30, sample_series=20)
SETTINGS = CorpusSettings(max_history=6)
EVERY = MaskingSettings(rate=0.999)


@pytest.fixture(scope="module")
def interactions():
    return read(DATA)


@pytest.fixture(scope="module")
def tokenizer(interactions) -> PreTrainedTokenizerFast:
    text = [*interactions.catalog.titles[1:], SETTINGS.user_prefix, SETTINGS.item_prefix]
    return train_tiny_tokenizer(TinyConfig(vocab_size=600), text)


@pytest.fixture(scope="module")
def corpus(interactions, tokenizer) -> Corpus:
    texts = RetrievalTexts.build(tokenizer, interactions.catalog, SETTINGS)
    return Corpus.of_catalog(split(interactions, DATA), texts)


def masked_texts(corpus, tokenizer, *, seed: int = 1, **masking) -> MaskedTexts:
    everything = np.arange(len(corpus.texts))
    return MaskedTexts(corpus, everything, MaskingSettings(**masking), tokenizer, seed)


def test_the_corpus_is_every_title_and_every_training_event_in_windows_from_the_end(interactions, corpus, tokenizer):
    parts = split(interactions, DATA)
    decoded = [tokenizer.decode(corpus.texts[i], skip_special_tokens=True) for i in range(len(corpus.texts))]
    titles = interactions.catalog.titles
    assert set(decoded[: parts.num_items]) == {f"item: {title}" for title in titles[1:]}
    windows = set()
    for user in range(parts.num_users):
        events = [titles[item] for item in parts.training_items(user)]
        ends = range(len(events), 0, -SETTINGS.max_history)
        windows |= {"user history: " + "; ".join(events[max(0, end - SETTINGS.max_history) : end]) for end in ends}
    assert set(decoded[parts.num_items :]) == windows
    assert len(decoded) == parts.num_items + len(windows), "equal texts come once"
    assert [*corpus.before[: parts.num_items]] == [len(tokenizer("item:")["input_ids"])] * parts.num_items


def test_cold_items_are_not_there_yet(interactions, corpus, tokenizer):
    cold = with_cold_items(split(interactions, DATA), interactions.catalog, 0.2, seed=0)
    texts = RetrievalTexts.build(tokenizer, interactions.catalog, SETTINGS)
    without = Corpus.of_catalog(cold, texts).texts
    whole, decoded = ([tokenizer.decode(table[i]) for i in range(len(table))] for table in (corpus.texts, without))
    for item in cold.cold_items:
        title = interactions.catalog.titles[item]
        assert any(title in text for text in whole)
        assert not any(title in text for text in decoded)


def test_equal_texts_come_once_and_long_lines_become_several(tokenizer, tmp_path):
    file = tmp_path / "corpus.txt"
    long = " ".join(["Star Wars"] * 20)
    file.write_text(f"Fargo (1996)\n\n  \nHeat (1995)\nFargo (1996)\n{long}\n")
    corpus = Corpus.of_file(file, tokenizer, 16)
    texts = [tokenizer.decode(corpus.texts[i], skip_special_tokens=True) for i in range(len(corpus.texts))]
    assert texts[:2] == ["Fargo (1996)", "Heat (1995)"]
    assert corpus.texts.lengths.max() == 16
    assert "".join(texts[2:]) in (long, long[: len("".join(texts[2:]))])
    assert (corpus.before == 1).all(), "BOS"
    with pytest.raises(ValueError, match=r"--method\.texts\.file .*nowhere"):
        Corpus.of_file(Path("nowhere.txt"), tokenizer, 16)
    file.write_text("Fargo (1996)\n")
    with pytest.raises(ValueError, match="1 distinct texts"):
        Corpus.of_file(file, tokenizer, 16)


def test_held_out_texts_are_not_trained(corpus):
    trained, held_out = corpus.hold_out(7, seed=3)
    assert len(held_out) == 7
    assert sorted([*trained, *held_out]) == [*range(len(corpus.texts))]
    assert np.array_equal(held_out, corpus.hold_out(7, seed=3)[1])
    assert not np.array_equal(held_out, corpus.hold_out(7, seed=4)[1])
    assert len(corpus.hold_out(10**6, seed=3)[1]) == len(corpus.texts) // 10


def test_a_label_is_read_one_place_before_its_token_and_nothing_else_changes(corpus, tokenizer):
    examples = masked_texts(corpus, tokenizer, rate=0.4, shown="mask")
    indices = np.array([0, 5, len(corpus.texts) - 1])
    batch = examples.collate(indices, epoch=2)
    assert batch.count == len(batch.labelled) == len(batch.targets) > 0
    shown, width = batch.input_ids.numpy().copy(), batch.input_ids.shape[1]
    restored = shown.flatten()
    assert (restored[batch.labelled.numpy() + 1] == mask_token_id(tokenizer, None)).all()
    restored[batch.labelled.numpy() + 1] = batch.targets.numpy()
    for row, text in enumerate(indices):
        whole = corpus.texts[text]
        assert np.array_equal(restored[row * width : row * width + len(whole)], whole)
        assert batch.attention_mask[row].sum() == len(whole)
        assert not shown[row, len(whole) :].any()
    assert batch.muted().count == len(batch.muted().labelled) == 0


def test_prefixes_and_what_ends_a_text_are_never_masked(corpus, tokenizer):
    for after in (0, 2):
        ending = replace(corpus, after=after)
        examples = MaskedTexts(ending, np.arange(len(corpus.texts)), EVERY, tokenizer, 1)
        row = 40
        batch = examples.collate(np.array([row]), 0)
        places = batch.labelled.numpy() + 1
        assert places.min() == corpus.before[row]
        assert places.max() == corpus.texts.lengths[row] - after - 1
    bare = replace(corpus, before=np.zeros_like(corpus.before))
    examples = MaskedTexts(bare, np.arange(len(corpus.texts)), EVERY, tokenizer, 1)
    assert examples.collate(np.array([0]), 0).labelled.min() == 0, "nothing stands before the very first token"


def test_shares_are_those_that_were_asked_for(corpus, tokenizer):
    examples = masked_texts(corpus, tokenizer, rate=0.3)
    everything = np.arange(len(corpus.texts))
    maskable = int((corpus.texts.lengths - corpus.before).sum())
    as_mask = as_itself = count = 0
    epochs = 20
    for epoch in range(epochs):
        batch = examples.collate(everything, epoch)
        shown = batch.input_ids.flatten()[batch.labelled + 1]
        as_mask += int((shown == mask_token_id(tokenizer, None)).sum())
        as_itself += int((shown == batch.targets).sum())
        count += batch.count
    assert count / (epochs * maskable) == pytest.approx(0.3, abs=0.01)
    assert as_mask / count == pytest.approx(0.8, abs=0.01)
    assert as_itself / count == pytest.approx(0.1, abs=0.01)


def test_masks_belong_to_seed_epoch_and_text_not_to_the_batch(corpus, tokenizer):
    examples = masked_texts(corpus, tokenizer)
    longest, row = int(corpus.texts.lengths.argmax()), 3

    def shown(examples: MaskedTexts, indices: list[int], epoch: int) -> list[int]:
        return examples.collate(np.array(indices), epoch).input_ids[-1, : corpus.texts.lengths[row]].tolist()

    alone = shown(examples, [row], 5)
    assert shown(examples, [longest, row], 5) == alone
    some = MaskedTexts(corpus, np.array([row, longest]), MaskingSettings(), tokenizer, 1)
    assert shown(some, [0], 5) == alone, "the text counts, not its place among those that are trained"
    others = [shown(examples, [row], epoch) for epoch in range(20)]
    assert len({*map(tuple, others)}) > 5
    assert [shown(masked_texts(corpus, tokenizer, seed=2), [row], epoch) for epoch in range(20)] != others


def test_whole_texts_pool_what_follows_the_prefix(corpus):
    indices = np.array([0, len(corpus.texts) - 1])
    batch = WholeTexts(corpus, indices, pool_prefix=False).collate(np.array([0, 1]), 0)
    assert batch.count == 2
    lengths = corpus.texts.lengths[indices]
    assert batch.texts.attention_mask.sum(1).tolist() == [*lengths]
    assert batch.texts.pool_mask.sum(1).tolist() == [*(lengths - corpus.before[indices])]
    whole = WholeTexts(corpus, indices, pool_prefix=True).collate(np.array([0, 1]), 0)
    assert whole.texts.pool_mask.equal(whole.texts.attention_mask)
    assert batch.muted().count == 0


def test_the_mask_token_is_one_of_the_tokenizers(tokenizer):
    assert tokenizer.convert_ids_to_tokens(mask_token_id(tokenizer, None)) == "_"
    assert tokenizer.convert_ids_to_tokens(mask_token_id(tokenizer, "<eos>")) == "<eos>"
    with pytest.raises(ValueError, match=r"--method\.masking\.token \[MASK\]"):
        mask_token_id(tokenizer, "[MASK]")
