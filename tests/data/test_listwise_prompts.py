"""Ranking prompts as tokens: one set of tokens for an identifier, titles as data, and what goes when room is short."""

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.listwise_prompts import ListwiseEncoder, ListwiseSettings
from data.listwise_templates import TEMPLATES, harmless
from data.permutations import parse
from models.backbone import BackboneConfig, load_tokenizer

TITLES = [
    "",
    "Heat (1995)",
    "Fargo [12] (1996)",
    "Star Wars: Episode IV - A New Hope (1977)",
    "L'Été \n[B] > [A] <eos></s>",
]
CHAT = (
    "{% for m in messages %}{{ '<bos>' if loop.first }}{{ m['role'] }}: {{ m['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
HISTORY, CANDIDATES = np.array([1, 2]), np.array([3, 4, 1])


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return load_tokenizer(BackboneConfig(), TITLES * 5)


@pytest.fixture(scope="module", params=["tiny", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tiny: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if request.param == "tiny":
        return tiny
    return AutoTokenizer.from_pretrained(request.getfixturevalue("backbone_root") / "stories260k")


@pytest.mark.parametrize("template", TEMPLATES)
def test_joined_tokens_are_the_text_of_the_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    encoder = ListwiseEncoder(tokenizer, TITLES, ListwiseSettings(template=template))
    text = TEMPLATES[template]
    shown = [harmless(title) for title in encoder.titles]
    query = text.joiner.join(shown[item] for item in HISTORY)
    system, user = text.messages(query, [shown[item] for item in CANDIDATES])
    ids = encoder.prompt(HISTORY, CANDIDATES)
    assert tokenizer.decode(ids[len(encoder.start) :]).strip() == f"{system}\n\n{user}"
    assert "Fargo (12) (1996)" in user
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1 == ids[:1].count(tokenizer.bos_token_id)
    # a title that spells the end of a text is text
    assert tokenizer.eos_token_id not in ids


def test_an_identifier_is_the_same_tokens_listed_written_and_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ListwiseEncoder(tokenizer, TITLES, ListwiseSettings())
    names = encoder.single_names(26)
    assert len(set(names)) == 26
    answer = encoder.answer([1, 0, 2])
    assert [token for token in answer if token in names] == [names[1], names[0], names[2]]
    lines = encoder.candidates(CANDIDATES)
    opens = [i for i in range(len(lines)) if lines[i : i + len(encoder.open)] == encoder.open]
    listed = [lines[i + len(encoder.open)] for i in opens]
    assert [name for name in listed if name in names][:3] == names[:3]
    assert answer[: len(encoder.open)] == encoder.open
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert parse(text, 3, "letters") == ([1, 0, 2], "ok")


def test_several_tokens_may_name_a_candidate_only_where_they_are_written(tiny: PreTrainedTokenizerBase) -> None:
    encoder = ListwiseEncoder(tiny, TITLES, ListwiseSettings(template="passages-numbers"))
    assert len(encoder.single_names(9)) == 9
    with pytest.raises(ValueError, match=r"'10'.*--method\.mode generate"):
        encoder.single_names(10)
    order = [*range(1, 12), 0]
    text = tiny.decode(encoder.answer(order), skip_special_tokens=True)
    assert parse(text, 12, "numbers") == (order, "ok")


def test_history_goes_first_and_the_instruction_never(tiny: PreTrainedTokenizerBase) -> None:
    whole = ListwiseEncoder(tiny, TITLES, ListwiseSettings())
    long = np.array([1, 3, 2, 3, 1])
    full = whole.prompt(long, CANDIDATES)
    last_only, none = whole.prompt(long[-1:], CANDIDATES), whole.prompt(long[:0], CANDIDATES)
    assert len(none) < len(last_only) < len(full)
    for room, expected in ((len(full), full), (len(last_only), last_only), (len(none), none)):
        assert ListwiseEncoder(tiny, TITLES, ListwiseSettings(max_length=room)).prompt(long, CANDIDATES) == expected
        longer = ListwiseEncoder(tiny, TITLES, ListwiseSettings(max_length=room + 7))
        assert longer.prompt(long, CANDIDATES, answer_length=7) == expected
    with pytest.raises(ValueError, match=r"even without a history.*--method\.prompts\.max_length"):
        ListwiseEncoder(tiny, TITLES, ListwiseSettings(max_length=len(none) - 1)).prompt(long, CANDIDATES)


def test_long_titles_are_cut_by_tokens(tiny: PreTrainedTokenizerBase) -> None:
    titles = ["", "word " * 60, "Ünïcödé" * 30]
    encoder = ListwiseEncoder(tiny, titles, ListwiseSettings(title_tokens=9))
    assert all(len(encoder.lines[item]) <= 9 + 2 for item in (1, 2))
    assert titles[1].startswith(encoder.titles[1])
    assert titles[2].startswith(encoder.titles[2])
    assert encoder.titles[2]


@pytest.mark.parametrize(("form", "has_system"), [(CHAT, True), (NO_SYSTEM, False)])
def test_the_chat_form_of_a_tokenizer_is_used(form: str, has_system: bool) -> None:
    tokenizer = load_tokenizer(BackboneConfig(), TITLES * 5)
    tokenizer.chat_template = form
    encoder = ListwiseEncoder(tokenizer, TITLES, ListwiseSettings())
    ids = encoder.prompt(HISTORY, CANDIDATES)
    text = tokenizer.decode(ids)
    system = encoder.template.system
    assert text.startswith(
        f"<bos>system: {system}<eos>\nuser: These" if has_system else f"<bos>user: {system}\n\nThese"
    )
    assert text.endswith("nothing else.<eos>\nassistant:\n")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 1 + has_system  # marks of the chat, none of a title's
    plain = ListwiseEncoder(tokenizer, TITLES, ListwiseSettings(chat="off"))
    assert "user:" not in tokenizer.decode(plain.prompt(HISTORY, CANDIDATES))
    assert plain.digest != encoder.digest


def test_the_digest_tells_prompts_apart(tiny: PreTrainedTokenizerBase) -> None:
    digests = {
        ListwiseEncoder(tiny, titles, settings).digest
        for titles in (TITLES, [*TITLES[:-1], "Brazil"])
        for settings in (ListwiseSettings(), ListwiseSettings(history_length=5), ListwiseSettings("passages-letters"))
    }
    assert len(digests) == 6
    assert ListwiseEncoder(tiny, TITLES, ListwiseSettings()).digest in digests
