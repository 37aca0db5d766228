"""Whether a generated text names a candidate, and the right one: the papers' rule, and an exact one.

Published figures: ValidRatio = valid / all, HitRatio@1 = correct / all. A text is correct only if it is valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["", "empty text", "names no candidate", "names several candidates", "says more than a title"]


@dataclass(frozen=True)
class TextHit:
    """The verdict on one text."""

    valid: bool
    hit: bool
    reason: Reason = ""  # why it is not valid


def scored_text(generated: str) -> str:
    """What of a generated text counts: its first line, after the blanks and newlines in front are gone."""
    return generated.strip().split("\n", 1)[0]


def exact_hit(generated: str, candidates: Sequence[str], target: str) -> TextHit:
    """The text must be the title of a candidate, but for case, blanks and outer quotes.

    Two candidates of one title are one answer: nobody can tell them apart by text.
    """
    answer = _normalised(scored_text(generated))
    if not answer:
        return TextHit(False, False, "empty text")
    titles = {_normalised(title) for title in candidates} - {""}
    if answer in titles:
        return TextHit(True, answer == _normalised(target))
    named = [title for title in titles if title in answer]
    # Where one title is inside another one, as in "Heat 2", only the longer one is named.
    longest = [title for title in named if not any(title in other for other in named if other != title)]
    reasons: tuple[Reason, Reason] = ("names no candidate", "says more than a title")
    return TextHit(False, False, "names several candidates" if len(longest) > 1 else reasons[len(longest)])


def published_hit(generated: str, candidates: Sequence[str], target: str) -> TextHit:
    """LLaRA's and iLoRA's rule: valid if exactly one entry of the list occurs anywhere in the text.

    An entry inside a longer one, or listed twice, makes a right answer invalid; an empty one occurs in every text.
    """
    text = _lowered(scored_text(generated))
    named = [title for title in map(_lowered, candidates) if title in text]
    if len(named) == 1:
        return TextHit(True, named[0] == _lowered(target))
    reason: Reason = "names several candidates" if named else "names no candidate" if text else "empty text"
    return TextHit(False, False, reason)


def summary(hits: Sequence[TextHit]) -> dict[str, float]:
    """ValidRatio, HR@1 of the valid texts and of all (the published HitRatio@1), and the share of each reason."""
    total, valid, correct = len(hits), sum(hit.valid for hit in hits), sum(hit.hit for hit in hits)
    if not total:
        raise ValueError("there are no texts to score")
    reasons = sorted({hit.reason for hit in hits if hit.reason})
    return {
        "ValidRatio": valid / total,
        "HR@1 correct/valid": correct / valid if valid else 0.0,
        "HR@1 correct/total": correct / total,
        **{f"invalid: {reason}": sum(hit.reason == reason for hit in hits) / total for reason in reasons},
    }


def _lowered(text: str) -> str:
    return text.strip().lower()


def _normalised(text: str) -> str:
    """Lower case, single blanks, without quotes around."""
    return " ".join(text.strip().strip("\"'").casefold().split())
