"""The exact rule counts titles, not substrings, and says why a text is not an answer."""

import pytest

from evaluation.text_hits import TextHit, exact_hit, published_hit, summary

CANDIDATES = ["Heat", "Heat 2", "Fargo", " Mr.  Pell's Umbrella", "fargo", "", "Up"]


@pytest.mark.parametrize(
    ("text", "target", "verdict"),
    [
        ("Heat", "Heat", TextHit(True, True)),
        ("Heat 2", "Heat 2", TextHit(True, True)),  # the published rule finds two entries in it
        ("Heat 2", "Heat", TextHit(True, False)),
        ("\n FARGO \nUp", "Fargo", TextHit(True, True)),  # two items of one title are one answer
        ("Fargo", "fargo", TextHit(True, True)),
        ('"Up"', "Up", TextHit(True, True)),
        ("mr. Pell's   umbrella", " Mr.  Pell's Umbrella", TextHit(True, True)),
        (" \n ", "Heat", TextHit(False, False, "empty text")),
        ("", "", TextHit(False, False, "empty text")),
        ("Casino", "Heat", TextHit(False, False, "names no candidate")),
        ("The answer is Heat 2", "Heat 2", TextHit(False, False, "says more than a title")),
        ("Heat, Fargo", "Heat", TextHit(False, False, "names several candidates")),
    ],
)
def test_exact_rule(text: str, target: str, verdict: TextHit) -> None:
    assert exact_hit(text, CANDIDATES, target) == verdict


def test_where_the_rules_differ() -> None:
    assert published_hit("Heat 2", CANDIDATES[:4], "Heat 2") == TextHit(False, False, "names several candidates")
    assert published_hit("I say Fargo!", CANDIDATES[:4], "Fargo") == TextHit(True, True)
    assert published_hit("", CANDIDATES[:4], "Fargo") == TextHit(False, False, "empty text")
    assert published_hit("", CANDIDATES, "Fargo") == TextHit(True, False), "an empty title is in every text"


def test_summary_counts_each_reason() -> None:
    hits = [exact_hit(text, CANDIDATES, "Heat") for text in ("Heat", "Up", "", "Casino")]
    assert summary(hits) == {
        "ValidRatio": 0.5,
        "HR@1 correct/valid": 0.5,
        "HR@1 correct/total": 0.25,
        "invalid: empty text": 0.25,
        "invalid: names no candidate": 0.25,
    }
    assert summary(hits[2:])["HR@1 correct/valid"] == 0.0
    with pytest.raises(ValueError, match="no texts"):
        summary([])
