"""LlamaRec's prompts, token ids, labels and collation, exactly as the published code makes them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from data.identifiers import encoded_alone, resolve
from tests.conftest import Golden


@pytest.fixture(scope="module")
def tokenizer(golden: Callable[[str], Golden]) -> PreTrainedTokenizerFast:
    golden("llamarec_prompts")  # skips where there is none
    folder = Path(os.environ.get("SHARDREC_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "llamarec_prompts" / "tokenizer.json"),
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
    )


def test_letter_ids_in_context_and_as_coded(
    golden: Callable[[str], Golden], tokenizer: PreTrainedTokenizerFast
) -> None:
    meta, _ = golden("llamarec_prompts")
    letters = "ABCDEFGHIJKLMNOPQRST"
    for case in meta["cases"]:
        assert resolve(tokenizer, case["prompt"], letters).tolist() == meta["letter_ids_as_generated"]
    assert encoded_alone(tokenizer, letters).tolist() == meta["letter_ids_as_coded"]
