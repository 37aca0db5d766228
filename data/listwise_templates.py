"""Texts that ask for a ranking of candidates: frozen, checked templates, and titles that cannot pose as identifiers.

The passage wording is that of castorini/rank_llm (single turn, numeric and alphabetic; the letters are those of FIRST,
arXiv 2406.15657); the wording for recommendation is ours.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import Formatter, ascii_uppercase
from typing import Literal, Self

import yaml

Identifiers = Literal["letters", "numbers"]
_REST_OF_LINE = re.compile(r"[^\n]*\n+")
_CUT = "\0"
PLACEHOLDERS = {"prefix": {"num", "query"}, "body": {"identifier", "item"}, "suffix": {"num", "query"}}


@dataclass(frozen=True)
class RankTemplate:
    """A system message and a user message: prefix, one body line a candidate, suffix.

    {num} is the number of candidates, {query} the history: its titles, oldest first, with `joiner` between them.
    Raises ValueError where a section names something else, or is not laid out as tokens are joined: the body is
    "[{identifier}] {item}" and a newline, and each {query} stands behind `joiner`'s last character and before the same
    rest of a line.
    """

    name: str
    identifiers: Identifiers
    system: str
    prefix: str
    suffix: str
    body: str = "[{identifier}] {item}\n"
    joiner: str = "; "

    def __post_init__(self) -> None:
        for section in fields(self):
            value = getattr(self, section.name)
            if not isinstance(value, str):
                raise ValueError(f"template {self.name!r}, section {section.name}: expected text, not {value!r}")
            unknown = placeholders(value) - PLACEHOLDERS.get(section.name, set())
            if unknown:
                expected = sorted(PLACEHOLDERS.get(section.name, set())) or "none"
                raise ValueError(
                    f"template {self.name!r}, section {section.name}: unknown placeholders {sorted(unknown)}, "
                    f"expected {expected}"
                )
        if self.identifiers not in ("letters", "numbers"):
            raise ValueError(f"template {self.name!r}, identifiers {self.identifiers!r}: expected letters or numbers")
        if self.body != "[{identifier}] {item}\n":
            raise ValueError(f"template {self.name!r}, body {self.body!r}: expected '[{{identifier}}] {{item}}\\n'")
        asked = self.prefix + self.body + self.suffix
        before, *behind = asked.split("{query}")
        ends = {found[0] if (found := _REST_OF_LINE.match(text)) else "" for text in behind}
        leads = {text[-1:] for text in (before, *behind[:-1])}
        whole_lines = self.prefix.endswith("\n") and all(ends)
        if not whole_lines or not self.joiner or leads != {self.joiner[-1]} or len(ends) != 1:
            raise ValueError(
                f"template {self.name!r}: expected a prefix that ends with a newline, and {{query}} behind "
                f"{self.joiner[-1:]!r}, the last character of joiner, and before the same rest of a line wherever it "
                "stands"
            )

    @classmethod
    def from_sections(cls, name: str, sections: Mapping[str, object]) -> Self:
        """The template of a file's sections; raises ValueError where one is missing or unknown."""
        known = {field.name for field in fields(cls)} - {"name"}
        missing = {"identifiers", "system", "prefix", "suffix"} - set(sections)
        if unknown := set(sections) - known:
            raise ValueError(f"template {name}: unknown sections {sorted(unknown)}, expected {sorted(known)}")
        if missing:
            raise ValueError(f"template {name}: sections {sorted(missing)} are missing")
        return cls(name=name, **sections)  # type: ignore[arg-type]  # values are checked by the class

    @property
    def closing(self) -> str:
        """What follows {query} up to the next line with text, newlines included."""
        return _REST_OF_LINE.match((self.prefix + self.body + self.suffix).split("{query}")[1])[0]  # type: ignore[index]

    def parts(self, num_candidates: int) -> tuple[list[str], list[str]]:
        """Prefix and suffix, each cut where the history stands."""
        prefix, suffix = (text.format(num=num_candidates, query=_CUT) for text in (self.prefix, self.suffix))
        return prefix.split(_CUT), suffix.split(_CUT)

    def identifier(self, place: int) -> str:
        """Name the candidate at this place of the prompt, from 0."""
        return identifier(self.identifiers, place)

    def messages(self, query: str, candidates: Sequence[str]) -> tuple[str, str]:
        """The system and the user message, titles as they are: for people, for comparison and for hashing."""
        known = {"num": str(len(candidates)), "query": query}
        lines = [self.body.format(identifier=self.identifier(i), item=item) for i, item in enumerate(candidates)]
        return self.system, self.prefix.format(**known) + "".join(lines) + self.suffix.format(**known)


def identifier(kind: Identifiers, place: int) -> str:
    """1, 2, ... or A, B, ...; raises ValueError where the letters end."""
    if kind == "numbers":
        return str(place + 1)
    if place >= len(ascii_uppercase):
        raise ValueError(
            f"candidate {place + 1} has no letter: pass --method.window of at most {len(ascii_uppercase)}, or a "
            "--method.prompts.template with numbers"
        )
    return ascii_uppercase[place]


def placeholders(text: str) -> set[str]:
    """The names in braces of a format text; raises ValueError where its braces do not match."""
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def _passages(name: str, identifiers: Identifiers, kind: str, example: str) -> RankTemplate:
    """The published single-turn text about passages."""
    return RankTemplate(
        name,
        identifiers,
        system="You are RankLLM, an intelligent assistant that can rank passages based on their relevancy to the query",
        prefix=f"I will provide you with {{num}} passages, each indicated by {kind} identifier []. Rank the passages "
        "based on their relevance to the search query: {query}.\n",
        suffix="Search Query: {query}.\nRank the {num} passages above based on their relevance to the search query. "
        "All the passages should be included and listed using identifiers, in descending order of relevance. The "
        f"output format should be [] > [], e.g., {example}, Answer concisely and directly and only respond with the "
        "ranking results, do not say any word or explain.",
    )


def _items(name: str, identifiers: Identifiers, noun: str, example: str) -> RankTemplate:
    """Our text about the next choice of a user; the history comes first, so that candidate orders share it."""
    return RankTemplate(
        name,
        identifiers,
        system="You rank items for a recommender system: a user's earlier choices tell what they will choose next.",
        prefix="These are the user's choices, oldest first:\n{query}\n\n"
        f"These are {{num}} candidates for the next choice, each with a {noun} in brackets:\n",
        suffix="Put all {num} candidates in order, the most likely next choice first. Name each by its "
        f"{noun} in brackets, exactly once, as in {example}, and write nothing else.",
        joiner="\n",
    )


TEMPLATES = {
    template.name: template
    for template in (
        _items("items-letters", "letters", "letter", "[B] > [A]"),
        _items("items-numbers", "numbers", "number", "[2] > [1]"),
        _passages("passages-letters", "letters", "an alphabetical", "[B] > [A]"),
        _passages("passages-numbers", "numbers", "a numerical", "[2] > [1]"),
    )
}


def rank_template(name: str) -> RankTemplate:
    """The template of this name, or that of a .yaml file; raises ValueError where there is none, or it is not sound."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(f"--method.prompts.template {name!r}: expected one of {sorted(TEMPLATES)}, or a .yaml file")
    try:
        sections = yaml.safe_load(Path(name).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--method.prompts.template {name}: {error}") from error
    if not isinstance(sections, dict):
        raise ValueError(f"--method.prompts.template {name}: expected sections and their texts")
    return RankTemplate.from_sections(name, sections)


# One candidate alone, behind the same history: scored by "yes" against "no", as monoT5 (arXiv 2003.06713) asks for true
# and false.
ONE_HISTORY = "These are the user's choices, oldest first:"
ONE_CANDIDATE = "This is a candidate for the next choice:"
ONE_QUESTION = "Will the user choose it next? Answer yes or no."
YES, NO = "yes", "no"

_POSING = re.compile(r"\[\s*(\d+|[A-Za-z])\s*\]")


def harmless(title: str) -> str:
    """A title as one line of data: [12] and [B] become (12) and (B), runs of blanks and line ends one blank.

    Invisible characters go, so that they cannot hide an identifier. What looks like an instruction stays inside its
    candidate's line, behind the identifier.
    """
    kinds = [(character, unicodedata.category(character)) for character in title]
    visible = "".join(" " if kind == "Cc" else character for character, kind in kinds if kind != "Cf")
    return _POSING.sub(r"(\1)", " ".join(visible.split()))


def published_passage(document: Mapping[str, str], max_words: int) -> str:
    """A document as the published code writes it, without its mending of wrongly decoded text: only to compare."""
    keys = ("text", "segment", "contents", "content", "body", "passage")
    text = next(document[key] for key in keys if key in document)
    if document.get("title"):
        text = f"Title: {document['title']} Content: {text}"
    return published_query(" ".join(text.split()[:max_words]))


def published_query(query: str) -> str:
    """A query as the published code writes it: numbers in brackets become numbers in parentheses, and no more."""
    return re.sub(r"\[(\d+)\]", r"(\1)", query)
