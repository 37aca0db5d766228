"""Ranking prompts: tokens equal to whole texts, what is cut and what never is, negatives, orders, and slots."""

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.batches import NO_LABEL
from data.candidate_store import CandidateStore, training_cuts
from data.identifiers import LETTERS, Identifiers, resolve
from data.interactions import Catalog
from data.ranking_batches import EvaluationRankings, RankingBatch, TrainingRankings
from data.ranking_prompts import BEFORE, CHOOSE, RESPONSE, RankingSettings, ranking_prompt, shown_titles
from data.ranking_tokens import RankingEncoder
from data.splits import Split
from data.title_tokens import encode
from models.backbone import BackboneConfig, load_tokenizer
from tests.toys import HARD_TITLES, byte_level_bpe, without_repeats

TITLES = [
    *HARD_TITLES,
    " a blank in front and behind ",
    "Ends with a semicolon;",
    "(500) Days of Summer (2009)",
    "3",
]
PLAIN = ["", *TITLES, *(f"Film number {number} (19{number})" for number in range(10, 60))]
NUM_ITEMS = len(PLAIN) - 1
K = 5
# How Llama-3 and Qwen cut text into words: brackets take newlines along, and blanks stay in front.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def split() -> Split:
    return without_repeats([3, 4, 9, 14, 30, 25, 8], NUM_ITEMS)


def bytes_in_words(words: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that learned the prompts by heart."""
    corpus = [ranking_prompt(TITLES, list(zip(LETTERS, TITLES, strict=False)))] * 3
    return byte_level_bpe(corpus, 900, words)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return load_tokenizer(BackboneConfig(), [*PLAIN, ranking_prompt(TITLES[:2], [("A", "Heat (1995)")])])


@pytest.fixture(scope="module")
def all_tokenizers(
    sentencepiece: PreTrainedTokenizerBase, tiny: PreTrainedTokenizerBase
) -> dict[str, PreTrainedTokenizerBase]:
    like_llama_3 = [
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return {
        "tiny": tiny,
        "sentencepiece": sentencepiece,
        "gpt-2": bytes_in_words(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "llama-3": bytes_in_words(pre_tokenizers.Sequence(like_llama_3)),
    }


def letters(tokenizer: PreTrainedTokenizerBase, count: int = K) -> Identifiers:
    return Identifiers(LETTERS[:count], resolve(tokenizer, ranking_prompt(["a"], [("A", "b")]), LETTERS[:count]))


VECTORS = Identifiers(tuple(map(str, range(1, K + 1))), None)


def encoder(tokenizer: PreTrainedTokenizerBase, identifiers: Identifiers | None, length: int = 20) -> RankingEncoder:
    return RankingEncoder(tokenizer, PLAIN, length, identifiers)


@pytest.mark.parametrize("name", ["tiny", "sentencepiece", "gpt-2", "llama-3"])
@pytest.mark.parametrize("pool", [True, False])
def test_joined_tokens_are_those_of_the_whole_text(
    all_tokenizers: dict[str, PreTrainedTokenizerBase], name: str, pool: bool
) -> None:
    """Every title at every kind of place: first, middle and last of a history, and of the candidates."""
    tokenizer = all_tokenizers[name]
    joins = encoder(tokenizer, letters(tokenizer) if pool else None)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    random = np.random.default_rng(1)
    for count in (0, 1, 2, 3, 12, 20):
        history = np.stack([np.roll(np.arange(1, NUM_ITEMS + 1), turn)[:count] for turn in range(NUM_ITEMS)])
        candidates = np.stack([random.permutation(NUM_ITEMS)[:K] + 1 for _ in range(NUM_ITEMS)])
        candidates[:, -1] = np.arange(1, NUM_ITEMS + 1)
        rows = joins.encode(history.ravel(), np.full(NUM_ITEMS, count), candidates).tokens
        for row in range(NUM_ITEMS):
            offered = [(LETTERS[i], PLAIN[item]) for i, item in enumerate(candidates[row])] if pool else None
            whole = ranking_prompt([PLAIN[item] for item in history[row]], offered)
            assert rows[row].tolist() == bos + encode(tokenizer, [whole])[0]


@pytest.mark.parametrize("name", ["tiny", "sentencepiece", "llama-3"])
def test_slots_of_vectors_stand_between_the_brackets(
    all_tokenizers: dict[str, PreTrainedTokenizerBase], name: str
) -> None:
    tokenizer = all_tokenizers[name]
    rows = encoder(tokenizer, VECTORS).encode(np.array([1, 2, 3]), np.array([2, 1]), np.array([[4, 6, 7, 9, 1]] * 2))
    assert rows.slots is not None
    for row in range(2):
        ids = rows.tokens[row].tolist()
        for place, item in zip(rows.slots[row], [4, 6, 7, 9, 1], strict=True):
            assert ids[place] == 0
            assert str(tokenizer.decode(ids[:place])).endswith(" (")
            assert str(tokenizer.decode(ids[place + 1 :])).lstrip().startswith(f") {PLAIN[item]}")


def test_titles_are_on_one_line_and_cut_by_tokens(tiny: PreTrainedTokenizerBase) -> None:
    titles = ("", "Two\nlines", "Film number 10 (1910)", "American President, The (President) (1995)")
    catalog = Catalog(titles, ((),) * 4, ("", "1", "2", "3"), has_titles=True)
    assert shown_titles(tiny, catalog, RankingSettings())[1] == "Two lines"
    assert shown_titles(tiny, catalog, RankingSettings(title_tokens=2))[2] == "Film number"
    assert shown_titles(tiny, catalog, RankingSettings(titles="published-movie"))[3] == "The American President (1995)"


def test_a_long_prompt_loses_its_oldest_titles_and_never_its_instruction(
    split: Split, tiny: PreTrainedTokenizerBase
) -> None:
    room = encoder(tiny, letters(tiny)).longest_without_history(K) + 10
    settings = RankingSettings(num_candidates=K, max_length=room)
    store = CandidateStore(np.tile(np.arange(1, K + 1, dtype=np.int32), (7, 1)), np.zeros((7, K), np.float32))
    batch = EvaluationRankings(split, "test", encoder(tiny, letters(tiny)), settings, 0, store).collate(np.arange(7))
    texts = [
        str(tiny.decode(ids[mask.bool()])) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    shortened = 0
    for row, text in enumerate(texts):
        assert text.removeprefix("<bos>").lstrip().startswith(BEFORE.format(instruction=CHOOSE))
        assert text.endswith(RESPONSE)
        history = [PLAIN[item] for item in split.history(row, int(split.test.position[row]))]
        listed = text.split("User history: ")[1].split("; \n Candidate")[0].split(" \n ")
        shown = [entry.partition(") ")[2] for entry in listed]
        assert shown == history[len(history) - len(shown) :], "the newest are left, numbered from 1"
        shortened += len(shown) < min(len(history), 20)
    assert shortened >= 3
    assert batch.attention_mask.sum(1).max() <= room


def test_candidates_that_may_not_fit_are_refused_at_once(split: Split, tiny: PreTrainedTokenizerBase) -> None:
    longest = encoder(tiny, letters(tiny)).longest_without_history(K)
    examples(split, tiny, RankingSettings(num_candidates=K, max_length=longest))
    with pytest.raises(ValueError, match=rf"take {longest} tokens.*--method\.prompts\.max_length {longest - 1}"):
        examples(split, tiny, RankingSettings(num_candidates=K, max_length=longest - 1))


def test_the_published_cut_loses_what_stands_first(split: Split, tiny: PreTrainedTokenizerBase) -> None:
    whole = examples(split, tiny, RankingSettings(num_candidates=K)).collate(np.arange(3), 0)
    cut = examples(split, tiny, RankingSettings(num_candidates=K, max_length=60, truncation="left")).collate(
        np.arange(3), 0
    )
    for row in range(3):
        ids = whole.input_ids[row][whole.attention_mask[row].bool()].tolist()
        assert cut.input_ids[row].tolist() == [tiny.bos_token_id, *ids[-59:]]


def examples(
    split: Split, tokenizer: PreTrainedTokenizerBase, settings: RankingSettings | None = None, **options: object
) -> TrainingRankings:
    settings = settings or RankingSettings(num_candidates=K)
    return TrainingRankings(split, encoder(tokenizer, letters(tokenizer)), settings, 3, **options)  # type: ignore[arg-type]


def test_every_training_event_but_the_first_is_an_example_among_unseen_items(
    split: Split, tiny: PreTrainedTokenizerBase
) -> None:
    rankings = examples(split, tiny)
    cuts = training_cuts(split)
    assert len(rankings.lengths) == len(cuts) == sum(max(end - 1, 0) for end in split.train_end)
    everything = np.arange(len(cuts))
    batch = rankings.collate(everything, 0)
    assert batch.answers is not None
    assert batch.count == len(cuts)
    for row, (user, position) in enumerate(zip(cuts.user, cuts.position, strict=True)):
        sequence, shown = split.training_items(user), batch.candidates[row].tolist()
        assert shown[batch.answers[row]] == sequence[position]
        assert not set(shown) & set(sequence[:position].tolist())
        assert len(set(shown)) == K
    assert set(batch.answers.tolist()) == set(range(K)), "the place of the target tells nothing"
    again = rankings.collate(everything[5:8], 0)
    assert again.candidates.tolist() == batch.candidates[5:8].tolist(), "a row does not depend on the others"
    other = rankings.collate(everything, 1)
    assert other.candidates.tolist() != batch.candidates.tolist()
    muted = batch.muted()
    assert muted.answers is not None
    assert muted.count == 0
    assert (muted.answers == NO_LABEL).all()


def test_hard_negatives_are_the_best_candidates_beside_the_target(split: Split, tiny: PreTrainedTokenizerBase) -> None:
    cuts, random = training_cuts(split), np.random.default_rng(0)
    items = np.stack([random.permutation(NUM_ITEMS)[:K] + 1 for _ in range(len(cuts))]).astype(np.int32)
    offsets = split.offsets[cuts.user] + cuts.position
    for row in range(0, len(cuts), 2):  # the retriever has found every second target
        if split.items[offsets[row]] not in items[row]:
            items[row, 1] = split.items[offsets[row]]
    store = CandidateStore(items, np.zeros(items.shape, np.float32))
    batch = examples(split, tiny, hard=store).collate(np.arange(len(cuts)), 0)
    assert batch.answers is not None
    for row in range(len(cuts)):
        target = split.items[offsets[row]]
        expected = [item for item in items[row].tolist() if item != target][: K - 1]
        assert sorted(batch.candidates[row].tolist()) == sorted([*expected, target])
        assert batch.candidates[row, batch.answers[row]] == target


def test_cuts_are_random_training_positions_of_each_user(split: Split, tiny: PreTrainedTokenizerBase) -> None:
    rankings = examples(split, tiny, cuts=2)
    trained = np.flatnonzero(split.train_end >= 2)
    assert len(rankings.lengths) == 2 * len(trained)
    seen: dict[int, set[int]] = {int(user): set() for user in trained}
    for epoch in range(200):
        batch = rankings.collate(np.arange(2 * len(trained)), epoch)
        assert batch.answers is not None
        targets = batch.candidates[np.arange(len(batch.answers)), batch.answers]
        for user, target in zip(np.repeat(trained, 2), targets.tolist(), strict=True):
            seen[int(user)].add(target)
    for user in trained:
        assert seen[int(user)] == set(split.training_items(int(user))[1:].tolist()), "all training events, no other"


def test_answers_follow_their_prompts_where_text_is_learned(split: Split, tiny: PreTrainedTokenizerBase) -> None:
    ids = letters(tiny).token_ids
    assert ids is not None
    with_answers = examples(split, tiny, answer_ids=ids).collate(np.arange(4), 0)
    plain = examples(split, tiny).collate(np.arange(4), 0)
    assert with_answers.answers is not None
    assert with_answers.count == 8
    flat = with_answers.input_ids.flatten()
    assert flat[with_answers.ends + 1].tolist() == ids[with_answers.answers].tolist()
    assert flat[with_answers.ends].tolist() == plain.input_ids.flatten()[plain.ends].tolist()
    assert (with_answers.attention_mask.sum(1) == plain.attention_mask.sum(1) + 1).all()


def test_an_evaluation_shows_candidates_in_the_retrievers_order_and_in_others(
    split: Split, tiny: PreTrainedTokenizerBase
) -> None:
    random = np.random.default_rng(0)
    items = np.stack([random.permutation(NUM_ITEMS)[:K] + 1 for _ in range(7)]).astype(np.int32)
    scores = -np.sort(random.random((7, K)).astype(np.float32))
    rankings = EvaluationRankings(
        *(split, "test", encoder(tiny, letters(tiny)), RankingSettings(num_candidates=K), 0),
        CandidateStore(items, scores),
        permutations=3,
    )
    batch = rankings.collate(np.array([6, 2]))
    assert batch.row is not None
    assert batch.retriever_scores is not None
    assert batch.row.tolist() == [6, 2]
    assert batch.candidates.tolist() == items[[6, 2]].tolist()
    assert batch.retriever_scores.tolist() == scores[[6, 2]].tolist()
    assert len(batch.input_ids) == 6
    assert batch.order[0].tolist() == batch.order[3].tolist() == list(range(K))
    assert len({tuple(order) for order in batch.order.tolist()}) > 2
    for prompt, order in enumerate(batch.order.tolist()):
        user = [6, 2][prompt // 3]
        assert pool_of(tiny, batch, prompt) == [
            f"({letter}) {PLAIN[items[user, place]]}" for letter, place in zip(LETTERS, order, strict=False)
        ]
    assert (batch.ends == np.arange(1, 7) * batch.input_ids.shape[1] - 1).all(), "prompts end where the row does"


def pool_of(tokenizer: PreTrainedTokenizerBase, batch: RankingBatch, row: int) -> list[str]:
    return text_of(tokenizer, batch, row).split("Candidate pool: ")[1].removesuffix(RESPONSE).split(" \n ")


def text_of(tokenizer: PreTrainedTokenizerBase, batch: RankingBatch, row: int) -> str:
    return str(tokenizer.decode(batch.input_ids[row][batch.attention_mask[row].bool()]))
