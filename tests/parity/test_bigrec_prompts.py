"""Prompt strings and the way back to titles against the published BIGRec, byte by byte."""

import pytest

from data.prompts import (
    BIGREC_GAME,
    BIGREC_MOVIE,
    clean_title,
    grounding_text,
    prediction,
    published_inference_spacing,
)

TEMPLATES = {"movie": BIGREC_MOVIE, "game": BIGREC_GAME}


@pytest.fixture
def meta(golden):
    return golden("bigrec_prompts")[0]


def test_prompts_of_every_case(meta) -> None:
    assert {case["domain"] for case in meta["cases"]} == set(TEMPLATES)
    for case in meta["cases"]:
        template = TEMPLATES[case["domain"]]
        prompt, response = template.prompt(case["history"]), template.response(case["target"])
        assert prompt == case["train_prompt_without_response"]
        assert response == case["output"]
        assert prompt + response == case["train_full"]
        assert published_inference_spacing(template).prompt(case["history"]) == case["inference_prompt"]


def test_prompt_without_history(meta) -> None:
    case = meta["no_input_case"]
    (template,) = [template for template in TEMPLATES.values() if case["instruction"] in template.alone]
    assert template.prompt([]) == case["inference_prompt"]
    assert template.prompt([]) + case["output"] == case["train_full"]
    assert published_inference_spacing(template).prompt([]) == case["inference_prompt"]


def test_reading_back_a_generated_text(meta) -> None:
    assert len(meta["decoding"]) > 1
    for case in meta["decoding"]:
        assert prediction(case["decoded_text"]) == case["prediction"]
        assert grounding_text(case["decoded_text"]) == case["grounding_text"]


def test_title_cleaning_of_all_scripts(meta) -> None:
    assert len(meta["title_normalisation"]) > 1
    for case in meta["title_normalisation"]:
        title = case["raw_title"]
        assert clean_title(title, "quotes") == case["movie_evaluate"]
        assert clean_title(title) == case["game_evaluate"]
        assert clean_title(title, "blanks-then-quotes") == case["embedding_notebook"]
        assert clean_title(f'"{title}"', "quotes") == case["movie_target_from_output"]
        assert clean_title(f'"{title}"') == case["game_target_from_output"]
