"""Written permutations, "[2] > [1] > [3]": the strict parser that runs use, and the published one to compare with."""

import re
from collections.abc import Callable
from string import ascii_uppercase
from typing import Literal, NamedTuple

from .listwise_templates import Identifiers

Status = Literal["ok", "wrong_format", "missing", "repetition"]
STATUSES: tuple[Status, ...] = ("ok", "wrong_format", "missing", "repetition")


class Parsed(NamedTuple):
    """An answer as an order: old places (from 0) in the new order, and what was wrong with the answer."""

    order: list[int]
    status: Status


Parser = Callable[[str, int, Identifiers], Parsed]

_WHOLE = {
    "numbers": re.compile(r"\[\d+\]( > \[\d+\])*"),
    "letters": re.compile(r"\[[A-Z]\]( > \[[A-Z]\])*"),
}
_THOUGHT = "</think>"


def permutation_text(identifiers: list[str]) -> str:
    """The answer that a parser accepts."""
    return " > ".join(f"[{name}]" for name in identifiers)


def parse(answer: str, num_candidates: int, identifiers: Identifiers) -> Parsed:
    """Read a permutation of all candidates; any other answer leaves them in their order, with its fault as status.

    Nothing is repaired: an error message or a sentence that holds numbers ranks nothing.
    """
    kept = list(range(num_candidates))
    text = answer.rpartition(_THOUGHT)[2].strip()
    if not _WHOLE[identifiers].fullmatch(text):
        return Parsed(kept, "wrong_format")
    names = re.findall(r"\[(\w+)\]", text)
    listed = [int(name) - 1 if identifiers == "numbers" else ascii_uppercase.index(name) for name in names]
    if len(listed) < num_candidates:
        return Parsed(kept, "missing")
    if len(listed) > num_candidates or len(set(listed)) < num_candidates:
        return Parsed(kept, "repetition")
    return Parsed(listed, "ok") if sorted(listed) == kept else Parsed(kept, "missing")


# Superscripts, subscripts, circled, negative circled, full-width digits, and digits with a full stop or a comma.
_LOOKALIKES = str.maketrans(
    dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True))
    | {chr(0x2080 + digit): str(digit) for digit in range(10)}
    | {chr(0x2460 + digit - 1): str(digit) for digit in range(1, 10)}
    | {chr(0x2776 + digit - 1): str(digit) for digit in range(1, 10)}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | {chr(0x1F100 + digit): str(digit) for digit in range(10)}
)


def parse_as_published(answer: str, num_candidates: int, identifiers: Identifiers) -> Parsed:
    """Read whatever looks like a number, as castorini/rank_llm does at 1b3cabb: only to compare with it.

    Here "top 3 of 20" and the digits of an error message rank candidates. Letters become numbers without anything
    between them, so "BA" is 21. Missing candidates follow in their order. The status is that of `parse`.
    """
    status = parse(answer, num_candidates, identifiers).status
    return Parsed(_repaired(published_cleaned(answer, identifiers), num_candidates), status)


def published_cleaned(answer: str, identifiers: Identifiers) -> str:
    """The numbers that the published parser sees in an answer."""
    text = answer
    if _THOUGHT in text:
        text = text.rpartition(_THOUGHT)[2].strip()
    text = text.translate(_LOOKALIKES)
    if identifiers == "numbers":
        return "".join(c if c.isdigit() else " " for c in text).strip()
    return "".join(str(ord(c) - 64) if c.isalpha() else " " for c in text).strip()


def _repaired(cleaned: str, num_candidates: int) -> list[int]:
    try:
        listed = [int(number) - 1 for number in cleaned.split()]
    except ValueError:  # a digit that is no decimal one
        listed = []
    valid = [place for place in dict.fromkeys(listed) if 0 <= place < num_candidates]
    return valid + [place for place in range(num_candidates) if place not in set(valid)]


PARSERS: dict[str, Parser] = {"strict": parse, "published": parse_as_published}
