"""Candidate prompts: tokens equal to whole texts, vectors in their slots, candidates that give nothing away."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.batches import NO_LABEL, PromptBatch
from data.candidate_batches import EvaluationCandidates, TrainingCandidates
from data.candidate_prompts import DOMAINS, MOVIE, Mode
from data.candidate_rows import CandidateSettings
from data.candidate_tokens import CandidateEncoder, Shown
from data.draws import Draws
from data.interactions import Catalog
from data.splits import Split
from models.backbone import BackboneConfig, load_tokenizer
from tests.toys import HARD_TITLES, byte_level_bpe, without_repeats

TITLES = [*HARD_TITLES, "unknown", "Mr. Pell's Umbrella (1992)"]
PLAIN = ["", *TITLES, *(f"Film number {number} (19{number})" for number in range(10, 60))]
NUM_ITEMS = len(PLAIN) - 1


@pytest.fixture(scope="module")
def split() -> Split:
    return without_repeats([3, 4, 9, 14, 30, 25, 8], NUM_ITEMS)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, whose words take brackets and commas together, without BOS."""
    corpus = [MOVIE.prompt(text, TITLES, TITLES, "text").replace(" [PH]", "") for text in range(3)] * 3
    return byte_level_bpe(corpus, vocab_size=700)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return load_tokenizer(BackboneConfig(), PLAIN)


@pytest.fixture(params=["byte_level", "sentencepiece", "tiny"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


def shown(mode: Mode, history: list[int], candidates: list[int], text: int) -> Shown:
    titles, vectors = (np.array([mode != hidden]) for hidden in ("id", "text"))
    counts = np.array([len(history)])
    return Shown(np.array(history, int), counts, np.array([candidates]), np.array([text]), titles, vectors)


def whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def listed(items: list[int]) -> list[str]:
    return [PLAIN[item] for item in items]


def without_markers(prompt: str) -> str:
    for marker in (" [PH]", " [HistoryEmb]", " [CansEmb]"):
        prompt = prompt.replace(marker, "")
    return prompt


# --- Tokens ---


@pytest.mark.parametrize("domain", ["movie", "game", "artist"])
def test_text_prompts_equal_their_whole_encoding(tokenizer, domain: str) -> None:
    texts = DOMAINS[domain]
    encoder = CandidateEncoder(tokenizer, texts, PLAIN)
    items = list(range(1, NUM_ITEMS + 1))
    for text in range(3):
        for history, candidates in ((items[:9], items[9:29]), (items[11:12], items[2:4]), (items[5:8], items[::-1])):
            prompt = without_markers(texts.prompt(text, listed(history), listed(candidates), "text"))
            rows = encoder.encode(shown("text", history, candidates, text))
            assert rows.tokens.ids.tolist() == whole(tokenizer, prompt)
            assert len(rows.slot_items) == 0


@pytest.mark.parametrize("mode", ["hybrid", "id"])
def test_slots_stand_for_markers(byte_level, tiny, mode: Mode) -> None:
    history, candidates = [3, 9, 7, 1], [8, 4, 12, 40, 5]
    for tokenizer in (byte_level, tiny):
        encoder = CandidateEncoder(tokenizer, MOVIE, PLAIN)
        for text in range(3):
            rows = encoder.encode(shown(mode, history, candidates, text))
            assert rows.slot_items.tolist() == history + candidates
            ids, told = rows.tokens.ids.tolist(), ""
            start = 0 if tokenizer.bos_token_id is None else 1
            markers = ["[HistoryEmb]"] * 4 + ["[CansEmb]"] * 5
            for offset, marker in zip(rows.slot_offset, markers, strict=True):
                assert ids[offset] == 0
                told += tokenizer.decode(ids[start:offset]) + " " + marker
                start = offset + 1
            told += tokenizer.decode(ids[start:])
            assert told == MOVIE.prompt(text, listed(history), listed(candidates), mode)


def test_hybrid_prompts_say_the_same_with_sentencepiece(sentencepiece) -> None:
    encoder = CandidateEncoder(sentencepiece, MOVIE, PLAIN)
    history, candidates = [1, 2, 12], [5, 11, 20]
    for text in range(3):
        rows = encoder.encode(shown("hybrid", history, candidates, text))
        said = np.delete(rows.tokens.ids, rows.slot_offset)
        prompt = without_markers(MOVIE.prompt(text, listed(history), listed(candidates)))
        assert sentencepiece.decode(said, skip_special_tokens=True) == prompt


def test_the_number_of_candidates_is_the_real_one(byte_level) -> None:
    encoder = CandidateEncoder(byte_level, MOVIE, PLAIN)
    for number in (2, 7, 20):
        rows = encoder.encode(shown("text", [1], list(range(2, 2 + number)), 0))
        assert f"the following {number} movie titles" in byte_level.decode(rows.tokens.ids)


def test_no_response_is_the_start_of_another_one(tokenizer) -> None:
    responses = CandidateEncoder(tokenizer, MOVIE, [*PLAIN, "Heat", "Heat (1995) 2", "Heat\n2"]).responses
    spelled = [responses[item].tolist() for item in range(1, len(responses))]
    for one in spelled:
        assert not [other for other in spelled if other != one and other[: len(one)] == one]
    assert spelled[1] == spelled[7], "equal titles are equal answers"


def test_settings_choose_words_and_titles(byte_level) -> None:
    raw_ids = ("", "r1", "r2", "r3")
    catalog = Catalog(("", "Glass Harbour, The (1987)", "unknown", " "), ((),) * 4, raw_ids, has_titles=True)
    plain = CandidateEncoder.build(byte_level, catalog, CandidateSettings(domain="game"))
    assert plain.item_titles == ["", "Glass Harbour, The (1987)", "unknown", "r3"]
    published = CandidateEncoder.build(byte_level, catalog, CandidateSettings(titles="published-movie"))
    assert published.item_titles[:3] == ["", "The Glass Harbour", ""]
    assert byte_level.decode(plain.encode(shown("text", [1], [2, 3], 0)).tokens.ids) == (
        "This user has played Glass Harbour, The (1987) in the previous. Please predict the next game this user will "
        "play. The game title candidates are unknown, r3. Choose only one game from the candidates. The answer is"
    )
    with pytest.raises(ValueError, match=r"--method\.prompts\.domain 'film': expected one of"):
        CandidateSettings(domain="film")


# --- Batches ---


def training(split: Split, tokenizer: PreTrainedTokenizerBase, seed: int = 1, **settings) -> TrainingCandidates:
    encoder = CandidateEncoder(tokenizer, MOVIE, PLAIN)
    return TrainingCandidates(split, encoder, CandidateSettings(**settings), seed)


def everything(examples) -> np.ndarray:
    return np.arange(len(examples.lengths))


@pytest.mark.parametrize("min_history", [1, 3])
def test_training_prompts_answer_every_event_with_enough_history(split, tiny, min_history: int) -> None:
    examples = training(split, tiny, min_history=min_history, history_length=5)
    batch = examples.collate(everything(examples), 0)
    expected = [(u, p) for u in range(split.num_users) for p in range(min_history, split.train_end[u])]
    assert list(zip(examples.rows.user, examples.rows.position, strict=True)) == expected
    assert batch.count == len(batch.labelled) == len(batch.targets)
    labels_BL = torch.full_like(batch.input_ids, NO_LABEL)
    labels_BL.view(-1)[batch.labelled] = batch.targets
    for row, (user, position) in enumerate(expected):
        ids, labels = batch.input_ids[row], labels_BL[row]
        length = int(batch.attention_mask[row].sum())
        assert batch.attention_mask[row, :length].all(), "pads stand on the right"
        before = split.history(user, position)
        target = split.training_items(user)[position]
        labelled = (labels != NO_LABEL).nonzero()[:, 0]
        assert labelled.tolist() == list(range(int(labelled[0]), length - 1))
        assert labels[labelled].tolist() == ids[labelled + 1].tolist()
        assert tiny.decode(labels[labelled]) == f" {PLAIN[target]}\n"
        assert tiny.decode(ids[: labelled[0] + 1]).endswith(("Answer:", "you recommend is:", "Recommendation:"))
        assert batch.history.items[row, : batch.history.lengths[row]].tolist() == before[-5:].tolist()
        offered = batch.candidates[row].tolist()
        assert len(set(offered)) == 20
        assert offered.count(target) == 1
        assert not set(offered) & set(before)
        assert set(offered) <= set(range(1, NUM_ITEMS + 1))


def test_expected_lengths_are_near_the_real_ones(split, tiny) -> None:
    examples = training(split, tiny)
    real = examples.collate(everything(examples), 0).attention_mask.sum(1).numpy()
    assert np.abs(examples.lengths / real - 1).max() < 0.15
    assert np.abs(examples.lengths.mean() / real.mean() - 1) < 0.05


def vectors_of(batch: PromptBatch, row: int) -> tuple[list[int], list[int]]:
    """Where in the row its item vectors stand, and their items."""
    width = batch.input_ids.shape[1]
    mine = batch.item_slots // width == row
    return (batch.item_slots[mine] % width).tolist(), batch.slot_items[mine].tolist()


def test_flat_slots_follow_their_titles(split, tiny) -> None:
    examples = training(split, tiny)
    held_out = np.column_stack([split.target_items("test"), unseen(split)])
    encoder = examples.encoder
    evaluation = EvaluationCandidates(split, "test", encoder, CandidateSettings(), 3, held_out)
    for batch in (examples.collate(everything(examples), 2), evaluation.collate(everything(evaluation))):
        assert len({int(length) for length in batch.attention_mask.sum(1)}) > 1, "rows are padded"
        for row in range(len(batch.input_ids)):
            slots, items = vectors_of(batch, row)
            length = int(batch.history.lengths[row])
            expected = batch.history.items[row, :length].tolist() + batch.candidates[row].tolist()
            assert items == expected
            assert batch.attention_mask[row, slots].all()
            for slot, item in zip(slots, items, strict=True):
                title = encoder.titles[0][item]
                assert batch.input_ids[row, slot - len(title) : slot].tolist() == title.tolist()


def unseen(split: Split, count: int = 19) -> np.ndarray:
    """[n, count] items that are not in the user's test history."""
    items = np.arange(1, NUM_ITEMS + 1)
    whole_user = [split.items[split.offsets[u] : split.offsets[u + 1]] for u in range(split.num_users)]
    return np.array([np.setdiff1d(items, seen)[:count] for seen in whole_user])


def rows_of(batch: PromptBatch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def test_an_example_depends_on_seed_epoch_and_number_alone(split, tiny) -> None:
    examples = training(split, tiny)
    together = rows_of(examples.collate(np.array([5, 2, 30]), 1))
    for place, index in enumerate([5, 2, 30]):
        assert rows_of(examples.collate(np.array([index]), 1)) == [together[place]]
    assert rows_of(training(split, tiny).collate(np.array([5, 2, 30]), 1)) == together
    for other in (examples.collate(np.array([5, 2, 30]), 2), training(split, tiny, 2).collate(np.array([5, 2, 30]), 1)):
        assert all(ours != theirs for ours, theirs in zip(rows_of(other), together, strict=True))


def test_candidates_are_uniform_and_their_order_tells_nothing(split, tiny) -> None:
    examples = training(split, tiny)
    index = np.array([12])
    row = examples.rows.take(index)
    target = examples.targets[12]
    epochs = 3000
    drawn = np.concatenate([examples.unseen.draw(index, Draws.of(1, epoch, index)) for epoch in range(epochs)])
    place = np.bincount((drawn == target).argmax(axis=1), minlength=20) / epochs * 20
    assert 0.6 < place.min() <= place.max() < 1.4
    possible = np.setdiff1d(np.arange(1, NUM_ITEMS + 1), split.history(int(row.user[0]), int(row.position[0]) + 1))
    counts = np.bincount(drawn.ravel(), minlength=NUM_ITEMS + 1)
    assert counts[possible].sum() + epochs == drawn.size
    frequency = counts[possible] / (epochs * 19) * len(possible)
    assert 0.85 < frequency.min() <= frequency.max() < 1.15
    texts = np.bincount([int(Draws.of(1, epoch, index).integers(0, 1, 3)[0, 0]) for epoch in range(epochs)])
    assert texts.min() / epochs > 0.3


def test_more_candidates_than_unseen_items_is_an_error(split, tiny) -> None:
    most_met = max(split.train_end)
    training(split, tiny, num_candidates=NUM_ITEMS - most_met + 1).collate(np.arange(3), 0)
    with pytest.raises(ValueError, match=r"--method\.prompts\.num_candidates"):
        training(split, tiny, num_candidates=NUM_ITEMS - most_met + 2)


def test_evaluation_offers_the_frozen_candidates(split, tiny) -> None:
    frozen = np.column_stack([split.target_items("test"), unseen(split)])
    encoder = CandidateEncoder(tiny, MOVIE, PLAIN)
    examples = EvaluationCandidates(split, "test", encoder, CandidateSettings(), 7, frozen)
    indices = np.array([4, 0, 6])
    batch = examples.collate(indices)
    assert batch.row.tolist() == indices.tolist()
    assert batch.labelled is None
    assert [sorted(row) for row in batch.candidates.tolist()] == [sorted(frozen[i]) for i in indices]
    for row, index in enumerate(indices):
        length = examples.lengths[index]
        assert batch.attention_mask[row].tolist() == [0] * (batch.input_ids.shape[1] - length) + [1] * length
        position = split.test.position[index]
        assert batch.history.items[row, : min(position, 10)].tolist() == split.history(index, position)[-10:].tolist()
        assert batch.input_ids[row, -1] == tiny(":", add_special_tokens=False)["input_ids"][-1]
    assert torch.equal(examples.collate(indices[::-1].copy()).candidates.flip(0), batch.candidates)
    places = set()
    for seed in range(9):
        shuffled = EvaluationCandidates(split, "test", encoder, CandidateSettings(), seed, frozen).candidates
        places |= set((shuffled == frozen[:, :1]).argmax(axis=1).tolist())
    assert len(places) > 15, "the target is anywhere"


def test_the_oldest_items_go_where_a_prompt_is_too_long(split, tiny) -> None:
    whole_batch = training(split, tiny).collate(np.array([20]), 0)
    length = int(whole_batch.attention_mask.sum())
    items = whole_batch.history.items[0]
    short = training(split, tiny, max_length=length - 1).collate(np.array([20, 21]), 0)
    assert short.attention_mask.sum(1).max() <= length - 1
    kept = int(short.history.lengths[0])
    assert short.history.items[0, :kept].tolist() == items[-kept:].tolist()
    assert vectors_of(short, 0)[1] == [*items[-kept:].tolist(), *whole_batch.candidates[0].tolist()]
    with pytest.raises(ValueError, match=r"--method\.prompts\.max_length 40: raise it"):
        training(split, tiny, max_length=40).collate(np.array([0]), 0)


# --- Curriculum ---


def test_shares_of_hybrid_prompts() -> None:
    linear = CandidateSettings(curriculum="linear", curriculum_epochs=4.0)
    assert [linear.hybrid_share(progress) for progress in (0, 1, 3.5, 4, 9)] == [0, 0.25, 0.875, 1, 1]
    step = CandidateSettings(curriculum="step", curriculum_epochs=2.5)
    assert [step.hybrid_share(progress) for progress in (0, 2.4999, 2.5, 3)] == [0, 0, 1, 1]
    assert CandidateSettings().hybrid_share(0.0) == 1.0
    with pytest.raises(ValueError, match=r"expected --method\.prompts\.mode hybrid, not text"):
        CandidateSettings(mode="text", curriculum="step")


def test_the_curriculum_turns_examples_from_text_to_hybrid(split, tiny) -> None:
    examples = training(split, tiny, curriculum="linear", curriculum_epochs=2.0)
    plain, indices = training(split, tiny), everything(examples)
    shares, hybrid_before = [], np.zeros(len(indices), dtype=bool)
    for progress in (0.0, 0.5, 1.0, 1.5, 2.0):
        batch = examples.collate(indices, 0, progress)
        hybrid = np.array([len(vectors_of(batch, row)[0]) > 0 for row in indices])
        assert (hybrid >= hybrid_before).all(), "within an epoch an example never falls back to text"
        shares.append(hybrid.mean())
        hybrid_before = hybrid
        assert torch.equal(batch.candidates, plain.collate(indices, 0).candidates)
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.15)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert rows_of(examples.collate(indices, 0, 2.0)) == rows_of(plain.collate(indices, 0))
    text = rows_of(training(split, tiny, mode="text").collate(indices, 0))
    assert rows_of(examples.collate(indices, 0, 0.0)) == text
