"""Letters as tokens: in the context of their prompt, on the tokenizers at hand, and refused where they are not one."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.identifiers import LETTERS, NotOneToken, resolve
from models.pretrained import load_saved_tokenizer
from models.tiny import TinyConfig, train_tiny_tokenizer

RESPONSE = "### Input:\nCandidate pool: (A) Heat (1995) \n (B) Fargo (1996)\n\n### Response:\n"


def byte_tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Bytes, and what `merges` make of them."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tokenizers(backbone_root: Path) -> list[PreTrainedTokenizerFast]:
    learned = [RESPONSE, "[A] Heat (1995)\n[B] Fargo (1996)", "The A Team (2010)"]
    return [train_tiny_tokenizer(TinyConfig(), learned), load_saved_tokenizer(str(backbone_root / "stories260k"))]


@pytest.mark.parametrize("prompt", [RESPONSE, "Rank the 2 movies: ["])
def test_letters_are_single_tokens_behind_a_newline_and_behind_a_bracket(backbone_root: Path, prompt: str) -> None:
    for tokenizer in tokenizers(backbone_root):
        ids = resolve(tokenizer, prompt, LETTERS)
        assert len(set(ids.tolist())) == 26
        for letter, token in zip(LETTERS, ids, strict=True):
            whole = tokenizer(prompt + letter, add_special_tokens=False)["input_ids"]
            assert whole[-1] == token, "the token that stands there is the one that is scored"
            assert whole[:-1] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_an_identifier_of_two_tokens_is_refused(backbone_root: Path) -> None:
    stories = load_saved_tokenizer(str(backbone_root / "stories260k"))
    with pytest.raises(NotOneToken, match="'AB' as"):
        resolve(stories, RESPONSE, ["A", "AB"])


def test_a_letter_that_merges_with_the_prompt_is_refused() -> None:
    merging = byte_tokenizer([("Ċ", "B")])
    assert resolve(merging, RESPONSE, ["A", "C"]).tolist() == merging.convert_tokens_to_ids(["A", "C"])
    with pytest.raises(NotOneToken, match="'B'"):
        resolve(merging, RESPONSE, ["A", "B"])


def test_two_labels_of_one_token_are_refused() -> None:
    with pytest.raises(NotOneToken, match="the same token"):
        resolve(byte_tokenizer([]), RESPONSE, ["A", "A"])
