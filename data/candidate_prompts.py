"""Prompts that offer candidates: the texts of LLaRA (arXiv 2312.02445) and iLoRA (arXiv 2408.10159)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

HISTORY, CANDIDATES, COUNT = "[HistoryHere]", "[CansHere]", "[CountHere]"

Mode = Literal["text", "id", "hybrid"]


class Pieces(NamedTuple):
    """What stands around the two lists of a prompt; no blank follows the last piece."""

    before: str
    between: str
    after: str


@dataclass(frozen=True)
class CandidateTexts:
    """The texts of one domain; each example draws one of them."""

    name: str
    texts: tuple[str, ...]

    def pieces(self, text: int, num_candidates: int) -> Pieces:
        """The pieces of one text, with the number of candidates that the prompt really offers."""
        before, rest = self.texts[text].replace(COUNT, str(num_candidates)).split(HISTORY)
        return Pieces(before, *rest.split(CANDIDATES))

    def prompt(self, text: int, history: Sequence[str], candidates: Sequence[str], mode: Mode = "hybrid") -> str:
        """A prompt as the papers print it: histories oldest first, and a marker where an item's vector stands.

        `text` prompts hold the published placeholder [PH] instead, `id` prompts markers alone. Only for people and for
        comparison: what the model reads is joined from tokens (`candidate_tokens.py`).
        """
        before, between, after = self.pieces(text, len(candidates))
        history_marker, candidate_marker = ("[PH]", "[PH]") if mode == "text" else ("[HistoryEmb]", "[CansEmb]")
        listed_history, listed_candidates = (
            ", ".join(marker if mode == "id" else f"{title} {marker}" for title in titles)
            for titles, marker in ((history, history_marker), (candidates, candidate_marker))
        )
        return before + listed_history + between + listed_candidates + after


def response(title: str) -> str:
    """The answer that names `title`; its newline ends it."""
    return title + "\n"


# The papers' own files fix the number at 10 or 20; both run with 20. Blanks at the end are stripped when they are read.
MOVIE = CandidateTexts(
    "movie",
    (
        "This user has watched [HistoryHere] in the previous. Please predict the next movie this user will watch. "
        "Choose the answer from the following [CountHere] movie titles: [CansHere]. Answer:",
        "This user has watched [HistoryHere] in the previous. Given the following [CountHere] movie titles: [CansHere],"
        " recommend one movie for this user to watch next. The movie title you recommend is:",
        "The visit history of this user is: [HistoryHere]. Recommend a next movie for this user to watch from the "
        "following movie title set: [CansHere]. The recommendation should contain one movie title only. "
        "Recommendation:",
    ),
)


def _texts_of_ours(noun: str, name: str, past: str, verb: str) -> tuple[str, str, str]:
    """Three texts for another kind of item, built like the movie ones; `name` is what its items are known by."""
    return (
        f"This user has {past} [HistoryHere] before. Please predict the next {noun} this user will {verb}. "
        f"Choose the answer from the following [CountHere] {name}s: [CansHere]. Answer:",
        f"This user has {past} [HistoryHere] before. Given the following [CountHere] {name}s: [CansHere], "
        f"recommend one {noun} for this user to {verb} next. The {name} you recommend is:",
        f"The history of this user is: [HistoryHere]. Recommend a next {noun} for this user to {verb} from the "
        f"following {name} set: [CansHere]. The recommendation should contain one {name} only. Recommendation:",
    )


# The first text of games and of artists is published; the others are ours.
GAME = CandidateTexts(
    "game",
    (
        "This user has played [HistoryHere] in the previous. Please predict the next game this user will play. "
        "The game title candidates are [CansHere]. Choose only one game from the candidates. The answer is",
        *_texts_of_ours("game", "game title", "played", "play")[1:],
    ),
)
ARTIST = CandidateTexts(
    "artist",
    (
        "This user has listened to [HistoryHere] in the previous. Please predict the next music artist this user will "
        "listen to. The artist name candidates are [CansHere]. Choose only one artist from the candidates. "
        "The answer is",
        *_texts_of_ours("music artist", "artist name", "listened to", "listen to")[1:],
    ),
)
BOOK = CandidateTexts("book", _texts_of_ours("book", "book title", "read", "read"))
ITEM = CandidateTexts("item", _texts_of_ours("item", "item title", "chosen", "choose"))

DOMAINS = {domain.name: domain for domain in (MOVIE, GAME, ARTIST, BOOK, ITEM)}


def texts_of_domain(name: str) -> CandidateTexts:
    """Look a domain up in `DOMAINS`; raises ValueError that lists the known names."""
    if name not in DOMAINS:
        raise ValueError(f"--method.prompts.domain {name!r}: expected one of {sorted(DOMAINS)}.")
    return DOMAINS[name]


def published_movie_title(title: str) -> str:
    """A MovieLens title as the published code writes it, with its quirks: only to compare with the papers.

    The last 7 characters go, whatever they are, so that "unknown" becomes empty; then every ", The" (else ", A", which
    also cuts "Summer, Again") goes, and the article stands in front.
    """
    title = title[: -len(" (1994)")]
    for article in ("The", "A"):
        if f", {article}" in title:
            return f"{article} " + title.replace(f", {article}", "")
    return title
