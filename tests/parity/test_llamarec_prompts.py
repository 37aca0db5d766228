"""LlamaRec's prompts, token ids, labels and collation, exactly as the published code makes them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from data.identifiers import LETTERS, Identifiers, encoded_alone, resolve
from data.ranking_batches import Padded
from data.ranking_prompts import cleaned_movie_title, cut_titles, ranking_input, ranking_prompt
from data.ranking_tokens import RankingEncoder, RankingRows
from tests.conftest import Golden

PAD, EOS = 0, 2


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


def shown(case: dict[str, Any], titles: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    history = [titles[item] for item in case["history"][-case["max_history"] :]]
    return history, [(LETTERS[i], titles[item]) for i, item in enumerate(case["candidates"])]


def cut(meta: dict[str, Any], tokenizer: PreTrainedTokenizerFast, case: dict[str, Any]) -> list[str]:
    titles = ["", *(meta["titles"][str(item)] for item in range(1, len(meta["titles"]) + 1))]
    return cut_titles(tokenizer, titles, case["max_title_len"])


def rows_of(meta: dict[str, Any], tokenizer: PreTrainedTokenizerFast, case: dict[str, Any]) -> RankingRows:
    """A case as our encoder joins it, cut on the left where it is too long, its answer left out."""
    candidates = np.array([case["candidates"]])
    identifiers = Identifiers(LETTERS[: candidates.shape[1]], resolve(tokenizer, "\n", LETTERS[: candidates.shape[1]]))
    encoder = RankingEncoder(tokenizer, cut(meta, tokenizer, case), case["max_history"], identifiers)
    history = np.array(case["history"][-case["max_history"] :])
    encoded = encoder.encode(history, np.array([len(history)]), candidates)
    room = case["max_text_len"] - (case["mode"] == "train")
    return RankingRows(encoder.cut_left(encoded.tokens, room), None)


def test_titles_are_cut_by_tokens(golden: Callable[[str], Golden], tokenizer: PreTrainedTokenizerFast) -> None:
    meta, _ = golden("llamarec_prompts")
    for case in meta["title_truncation"]:
        assert cut_titles(tokenizer, [case["title"]], case["max_title_len"]) == [case["text"]]


def test_titles_are_cleaned(golden: Callable[[str], Golden]) -> None:
    meta, _ = golden("llamarec_prompts")
    for case in meta["title_cleaning"]:
        assert cleaned_movie_title(case["raw"]) == case["clean"]


def test_text_is_the_published_one(golden: Callable[[str], Golden], tokenizer: PreTrainedTokenizerFast) -> None:
    meta, _ = golden("llamarec_prompts")
    for case in meta["cases"]:
        texts = shown(case, cut(meta, tokenizer, case))
        assert ranking_input(*texts) == case["input"]
        answer = LETTERS[case["candidates"].index(case["label"])] if case["mode"] == "train" else ""
        assert ranking_prompt(*texts) + answer == case["prompt"]


def test_joined_tokens_and_labels(golden: Callable[[str], Golden], tokenizer: PreTrainedTokenizerFast) -> None:
    meta, _ = golden("llamarec_prompts")
    for case in meta["cases"]:
        answer = case["candidates"].index(case["label"])
        ids = rows_of(meta, tokenizer, case).tokens.ids.tolist()
        if case["mode"] == "train":
            letter = meta["letter_ids_as_generated"][answer]
            ids += [letter, EOS]
            assert case["labels"] == [-100] * (len(ids) - 2) + [letter, EOS]
        else:
            assert case["labels"] == answer
        assert ids == case["input_ids"]


def test_collated_rows(golden: Callable[[str], Golden], tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows of prompts and answers, padded on the left; the published code cuts them once more, and adds EOS."""
    meta, _ = golden("llamarec_prompts")
    for mode, collated in meta["collate"].items():
        for index, expected, mask in zip(
            *(collated[name] for name in ("case_indices", "input_ids", "attention_mask")), strict=True
        ):
            case = meta["cases"][index]
            trains = mode == "train"
            letter = np.array([meta["letter_ids_as_generated"][case["candidates"].index(case["label"])]])
            padded = Padded.of(rows_of(meta, tokenizer, case), "left", letter if trains else None)
            ids = padded.ids[0].tolist() + [EOS] * trains
            assert expected == ([PAD] * len(expected) + ids)[-len(expected) :]
            assert mask == ([0] * len(expected) + padded.mask[0].tolist() + [1] * trains)[-len(expected) :]
            assert padded.ids[0, padded.ends[0]] == meta["special_ids"]["newline"]
