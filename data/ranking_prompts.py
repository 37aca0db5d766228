"""Prompts that list a history and lettered candidates: the text of LlamaRec (arXiv 2311.02089), and their settings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .interactions import Catalog
from .prompt_rows import PromptSettings
from .prompts import title_texts
from .title_tokens import encode

# The published text. Entries are joined by a blank, a newline and a blank.
BEFORE = "### Instruction:\n{instruction}\n\n### Input:\nUser history:"
CHOOSE = "Given user history in chronological order, recommend an item from the candidate pool with its index letter."
POOL = " Candidate pool:"
JOINT = " \n"
RESPONSE = "\n\n### Response:\n"
# Ours, for a prompt without candidates, whose last state is matched with item vectors.
NAME = "Given user history in chronological order, recommend the next item."


@dataclass(frozen=True)
class RankingSettings:
    """How prompts are made."""

    num_candidates: int = 20
    """Candidates of a prompt: the retriever's best, or in training the target and its negatives."""
    history_length: int = 20
    """History items in a prompt, at most: the last ones."""
    min_history: int = 1
    """Train on positions with at least this many events before them."""
    title_tokens: int = 32
    """Tokens of a title, at most; what is behind them is cut."""
    max_length: int = 1536
    """Tokens of a prompt, at most."""
    truncation: Literal["history", "left"] = "history"
    """What a longer prompt loses. history: its oldest history items. left: whatever stands first, the instruction too,
    as published."""
    titles: Literal["plain", "published-movie"] = "plain"
    """Titles as they are, or MovieLens's as published: text in brackets but the year taken out, articles in front."""

    def __post_init__(self) -> None:
        for name, least in (("num_candidates", 2), ("title_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--method.prompts.{name} {getattr(self, name)}: expected at least {least}.")
        self.history()

    def history(self) -> PromptSettings:
        """What these settings say of histories alone."""
        return PromptSettings(
            history_length=self.history_length, min_history=self.min_history, max_length=self.max_length
        )


def ranking_input(history: Sequence[str], candidates: Sequence[tuple[str, str]] | None) -> str:
    """The input of a prompt: histories oldest first, candidates as (label, title); None for a prompt without them."""
    listed = f"{JOINT} ".join(f"({number}) {title}" for number, title in enumerate(history, start=1))
    text = f"User history: {listed}"
    if candidates is None:
        return text
    pool = f"{JOINT} ".join(f"({label}) {title}" for label, title in candidates)
    return f"{text};{JOINT}{POOL} {pool}"


def ranking_prompt(history: Sequence[str], candidates: Sequence[tuple[str, str]] | None) -> str:
    """A whole prompt, for people and for comparison; what the model reads is joined from tokens."""
    instruction = BEFORE.format(instruction=NAME if candidates is None else CHOOSE)
    return instruction.removesuffix("User history:") + ranking_input(history, candidates) + RESPONSE


def shown_titles(tokenizer: PreTrainedTokenizerBase, catalog: Catalog, settings: RankingSettings) -> list[str]:
    """The titles as prompts show them, [N + 1]: on one line each, cleaned where asked for, and cut to length."""
    titles = [title.replace("\n", " ") for title in title_texts(catalog)]
    if settings.titles == "published-movie":
        titles = ["", *map(cleaned_movie_title, titles[1:])]
    return cut_titles(tokenizer, titles, settings.title_tokens)


def cut_titles(tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], num_tokens: int) -> list[str]:
    """The first `num_tokens` tokens of each title, as text; a title that has no more stays as it is."""
    return [
        str(tokenizer.decode(ids[:num_tokens], clean_up_tokenization_spaces=False)) if len(ids) > num_tokens else title
        for title, ids in zip(titles, encode(tokenizer, list(titles)), strict=True)
    ]


def cleaned_movie_title(title: str) -> str:
    """A MovieLens title as LlamaRec's code writes it, with its quirks: only to compare with the paper.

    The last 7 characters, meant for the year, are left alone, whatever they are; ", Ana" counts as an article.
    """
    name, year = re.sub(r"\(.*?\)", "", title[:-7]).strip(), title[-7:]
    if any(article in name[-5:].lower() for article in (", a", ", an", ", the")):
        name, _, article = name.rpartition(", ")
        name = f"{article} {name}"
    return name + year
