"""Templates beyond the published strings: short forms, look-up, blank titles."""

import dataclasses

import pytest

from data.interactions import Catalog
from data.prompts import (
    BIGREC_NOTES,
    DENSE,
    TEMPLATES,
    grounding_text,
    prediction,
    published_inference_spacing,
    template_by_name,
    title_texts,
)


def test_short_form() -> None:
    assert BIGREC_NOTES.prompt(["Item A", "Item B", "Item C"]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request. \n\n"
        "### Instruction:\nRecommend the next item for the user.\n\n"
        "### Input:\nItem A, Item B, Item C\n\n"
        "### Response:\n"
    )
    assert BIGREC_NOTES.response("Item D") == "Item D"


def test_dense_form_is_a_line_then_titles_as_they_are() -> None:
    assert DENSE.prompt([]).endswith("\n")
    assert DENSE.prompt(["Heat", "Fargo"]) == DENSE.prompt([]) + "Heat\nFargo\n"
    assert DENSE.response("Heat") == "Heat"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_response_stands_at_the_start_of_a_line_and_reads_back(template) -> None:
    for history in ([], ["Heat"], ["Heat", "Fargo"]):
        assert template.prompt(history).endswith("\n")
    if template is not DENSE:  # its prompt has no "Response:" line
        text = template.prompt(["Heat", "Fargo"]) + template.response("Brazil (1985)")
        assert prediction(text) == template.response("Brazil (1985)")
        assert grounding_text(text) == "Brazil (1985)"


def test_published_spacing_changes_one_blank_and_only_with_a_history() -> None:
    template = TEMPLATES["bigrec-game"]
    published = published_inference_spacing(template)
    assert len(published.prompt(["Doom"])) == len(template.prompt(["Doom"])) + 1
    assert published.prompt([]) == template.prompt([])


def test_unknown_template_names_the_known_ones() -> None:
    assert template_by_name("bigrec-notes") is BIGREC_NOTES
    with pytest.raises(ValueError, match=r"'alpaca'.*bigrec-game.*bigrec-movie.*bigrec-notes.*dense"):
        template_by_name("alpaca")


def test_templates_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BIGREC_NOTES.quote = "'"  # type: ignore[misc]


def test_blank_titles_show_the_raw_id() -> None:
    catalog = Catalog(
        titles=("", "Heat", "", " \t", " Agatha Christie"),
        categories=((),) * 5,
        raw_ids=("", "10", "11", "12", "13"),
        has_titles=True,
    )
    assert title_texts(catalog) == ["", "Heat", "11", "12", " Agatha Christie"]
