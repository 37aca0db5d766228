"""What a writer is told of an item or a user, and the texts that need no language model."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

Words = Literal["movie", "item"]
_YEAR = re.compile(r"\((\d{4})\)\s*$")
NAMED = 3  # kinds, titles or decades that a template names of each sort


class Event(NamedTuple):
    """One event of a history in words."""

    title: str
    categories: tuple[str, ...]
    rating: float | None  # None where the data set has none


@dataclass(frozen=True)
class Wording:
    """How one domain is spoken of."""

    a_thing: str
    thing: str
    things: str
    met: str  # what users do with things
    item_aspects: str
    user_aspects: str


WORDINGS: dict[Words, Wording] = {
    "movie": Wording(
        "a movie", "movie", "movies", "watched", "genre, mood, theme and style", "genre, mood, theme, style and era"
    ),
    "item": Wording(
        "an item", "item", "items", "chosen", "kind, purpose, style and quality", "kind, purpose, style and quality"
    ),
}


def item_facts(title: str, categories: Sequence[str]) -> str:
    """One line that says what is known of an item."""
    return f"{title} ({', '.join(categories)})" if categories else title


def event_facts(event: Event) -> str:
    """One line that says what is known of an event."""
    rated = "" if event.rating is None else f", rated {event.rating:g}"
    return item_facts(event.title, event.categories) + rated


def item_prompt(words: Words, title: str, categories: Sequence[str]) -> str:
    """Ask for the description of an item."""
    wording = WORDINGS[words]
    return (
        f"Describe the {wording.thing} below in at most three sentences of plain text: its "
        f"{wording.item_aspects}, and who would enjoy it. Say nothing that you do not know.\n\n"
        f"The {wording.thing}: {item_facts(title, categories)}"
    )


def user_prompt(words: Words, events: Sequence[Event]) -> str:
    """Ask for the taste of a user, likes against dislikes where the ratings tell them apart."""
    wording = WORDINGS[words]
    liked, disliked = likes(events)
    if disliked:
        lists = f"Rated above their average:\n{_lines(liked)}\n\nRated below it:\n{_lines(disliked)}"
        task = "what they like and what they dislike"
    else:
        lists, task = f"{wording.met.capitalize()}, oldest first:\n{_lines(events)}", "what they like"
    return (
        f"One user's {wording.things} are listed below. Sum up {task} in at most four sentences of plain text, in "
        f"terms of {wording.user_aspects}, and say how their taste has changed of late. "
        f"Name no {wording.thing} that is not listed.\n\n{lists}"
    )


def item_template(words: Words, title: str, categories: Sequence[str]) -> str:
    """What can be said of an item without a language model."""
    plain, year = _split_year(title)
    when = f" of {year}" if year else ""
    kinds = f" Kind: {', '.join(categories)}." if categories else ""
    return f"{plain}, {WORDINGS[words].a_thing}{when}.{kinds}"


def user_template(words: Words, events: Sequence[Event]) -> str:
    """What can be said of a user without a language model."""
    wording = WORDINGS[words]
    liked, disliked = likes(events)
    kinds, decades = _kinds(events), Counter(f"{year[:3]}0s" for e in events if (year := _split_year(e.title)[1]))
    sentences = []
    if kinds:
        share = ", ".join(f"{name} ({100 * count / len(events):.0f} %)" for name, count in kinds.most_common(2 * NAMED))
        sentences.append(f"Mostly {wording.met}: {share}.")
    if decades:
        sentences.append(f"From the {', '.join(name for name, _ in decades.most_common(NAMED))}.")
    if disliked:
        # A kind is liked or not by its ratings beside those of the whole history: the frequent ones would lead both.
        mean = fmean(_rating(e) for e in events)
        gains = {kind: sum(_rating(e) - mean for e in events if kind in e.categories) for kind in kinds}
        by_gain = sorted(gains, key=lambda kind: (-gains[kind], kind))
        best, worst = [k for k in by_gain if gains[k] > 0][:NAMED], [k for k in by_gain[::-1] if gains[k] < 0][:NAMED]
        newest_first = liked[::-1]
        favourites = sorted(newest_first, key=lambda e: -_rating(e))[:NAMED]
        sentences += [f"Likes {', '.join(best)}."] if best else []
        sentences += [f"Dislikes {', '.join(worst)}."] if worst else []
        sentences.append(f"Favourites: {_titles(favourites)}.")
    sentences.append(f"Lately {wording.met}: {_titles(events[: -NAMED - 1 : -1])}.")
    return " ".join(sentences)


def wording_digest(words: Words, writer: Literal["template", "model"]) -> str:
    """A hash of what is said around the facts."""
    events = [Event("A (1990)", ("x",), 1.0), Event("B (1990)", ("y",), 2.0), Event("C", ("z",), None)]
    of_item, of_user = (item_template, user_template) if writer == "template" else (item_prompt, user_prompt)
    texts = (of_item(words, "A (1990)", ("x",)), of_user(words, events[:2]), of_user(words, events))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def likes(events: Sequence[Event]) -> tuple[list[Event], list[Event]]:
    """Events rated at or above the mean of the list, and those below; all are liked where ratings do not differ."""
    rated = [e.rating for e in events if e.rating is not None]
    if len(rated) < len(events) or len(set(rated)) < 2:
        return list(events), []
    mean = fmean(rated)
    return [e for e in events if _rating(e) >= mean], [e for e in events if _rating(e) < mean]


def _rating(event: Event) -> float:
    assert event.rating is not None
    return event.rating


def _kinds(events: Sequence[Event]) -> Counter[str]:
    return Counter(kind for event in events for kind in event.categories)


def _lines(events: Sequence[Event]) -> str:
    return "\n".join(f"- {event_facts(event)}" for event in events)


def _titles(events: Sequence[Event]) -> str:
    return "; ".join(event.title for event in events)


def _split_year(title: str) -> tuple[str, str]:
    found = _YEAR.search(title)
    return (title[: found.start()].rstrip(), found.group(1)) if found else (title, "")
