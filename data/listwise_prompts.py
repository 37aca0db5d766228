"""Ranking prompts as tokens: every title is encoded once, and rows are joined from pieces."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .interactions import Catalog
from .listwise_templates import NO, ONE_CANDIDATE, ONE_HISTORY, ONE_QUESTION, YES, harmless, rank_template
from .prompt_rows import PromptSettings
from .prompts import title_texts
from .title_tokens import TokenTable, encode, encode_after


@dataclass(frozen=True)
class ListwiseSettings:
    """How ranking prompts are written. Raises ValueError when a setting makes no sense."""

    template: str = "items-letters"
    """items-letters or items-numbers; passages-letters or passages-numbers, the wording of search; or a .yaml file with
    the sections identifiers, system, prefix, suffix and joiner."""
    chat: Literal["auto", "off"] = "auto"
    """auto: in the form that the tokenizer's chat template gives, where it has one; off: as plain text."""
    history_length: int = 20
    """History items in a prompt, at most: the last ones."""
    min_history: int = 1
    """Train on positions with at least this many events before them."""
    title_tokens: int = 32
    """Tokens of a title, at most; the rest is cut off."""
    max_length: int = 2048
    """Tokens of a prompt with its answer, at most; the oldest history items are dropped to fit."""

    def __post_init__(self) -> None:
        rank_template(self.template)
        if self.title_tokens < 1:
            raise ValueError(f"--method.prompts.title_tokens {self.title_tokens}: expected at least 1")
        self.history()

    def history(self) -> PromptSettings:
        """What these settings say of histories alone."""
        return PromptSettings(
            history_length=self.history_length, min_history=self.min_history, max_length=self.max_length
        )


class Pieces(NamedTuple):
    """What stands around histories and candidates, as tokens: the parts of the prefix, and those of the suffix."""

    prefix: list[list[int]]
    suffix: list[list[int]]


class ListwiseEncoder:
    """Joins prompts from tokens; an identifier is the same tokens in the list, in the answer and where it is scored.

    An answer is "[B] > [A]" and EOS: `open`, a name, `between`, a name, `close`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], settings: ListwiseSettings) -> None:
        """`titles` [N + 1] begin with that of padding."""
        self.tokenizer, self.settings = tokenizer, settings
        self.template = template = rank_template(settings.template)
        self.titles = cut_titles(tokenizer, list(map(harmless, titles)), settings.title_tokens)
        # A word brings the blank in front of it along; behind any other joiner a title starts alone.
        self.lead = " " if template.joiner.endswith(" ") else ""
        self.before_title = ":" if self.lead else "\n"
        joiner = template.joiner.removesuffix(" ")
        self.listed, self.last = (
            self._titles(self.before_title, f"{self.lead}{{}}{end}") for end in (joiner, template.closing)
        )
        (self.no_history,) = encode_after(tokenizer, self.before_title, [template.closing])
        self.lines = self._titles("]", " {}\n")
        (self.open,), (self.close,) = (encode_after(tokenizer, *after) for after in (("\n", ["["]), ("A", ["]"])))
        (self.between,) = encode_after(tokenizer, "A", ["] > ["])
        self.chats = tokenizer.chat_template is not None and settings.chat == "auto"
        # the text of a chat has its own
        self.start = [] if self.chats or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.pieces = lru_cache(None)(self._pieces)
        self.name = lru_cache(None)(self._name)
        self.single_names = lru_cache(None)(self._single_names)

    @classmethod
    def build(
        cls, tokenizer: PreTrainedTokenizerBase, catalog: Catalog, settings: ListwiseSettings
    ) -> "ListwiseEncoder":
        """The encoder of a catalogue's titles."""
        return cls(tokenizer, title_texts(catalog), settings)

    def _titles(self, lead: str, form: str) -> TokenTable:
        return TokenTable.of(encode_after(self.tokenizer, lead, [form.format(title) for title in self.titles]))

    def _name(self, place: int) -> list[int]:
        return encode_after(self.tokenizer, "[", [self.template.identifier(place)])[0]

    def _single_names(self, num_candidates: int) -> list[int]:
        """The one token that names each place; raises ValueError where a name has several, or two have the same."""
        names = [self.name(place) for place in range(num_candidates)]
        wrong = [self.template.identifier(place) for place, name in enumerate(names) if len(name) != 1]
        if wrong or len({name[0] for name in names}) < num_candidates:
            raise ValueError(
                f"--method.prompts.template {self.settings.template} names {num_candidates} candidates, and the "
                f"tokenizer does not write {wrong or 'each'} as a token of its own: pass items-letters or a smaller "
                "--method.window; or --method.mode generate, which trains by --method.objective generation alone"
            )
        return [name[0] for name in names]

    def _frame(self) -> tuple[str, str]:
        """The text before and behind the user's message, system message included."""
        system, marker = self.template.system, "<<message>>"
        if not self.chats:
            return f"{system}\n\n", "\n"
        try:
            text = self._chat([{"role": "system", "content": system}, {"role": "user", "content": marker}])
        except TemplateError:  # a chat without system messages
            text = self._chat([{"role": "user", "content": f"{system}\n\n{marker}"}])
        before, _, behind = text.partition(marker)
        return before, behind

    def _chat(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert isinstance(text, str)
        return text

    def _pieces(self, num_candidates: int) -> Pieces:
        prefix, suffix = self.template.parts(num_candidates)
        before, behind = self._frame()
        suffix[-1] += behind
        prefix, suffix = map(self._without_edges, (prefix, suffix))
        head = self.start + self._ours(before + prefix[0])
        return Pieces([head, *map(self._behind_line, prefix[1:])], list(map(self._behind_line, suffix)))

    def _without_edges(self, parts: list[str]) -> list[str]:
        """Leave to the history the end of its line, and the blank in front of it."""
        texts = [parts[0], *(part.removeprefix(self.template.closing) for part in parts[1:])]
        return [text.removesuffix(self.lead) for text in texts[:-1]] + texts[-1:]

    def _ours(self, text: str) -> list[int]:
        """Tokens of a text of the template, in which the marks of a chat are marks."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _behind_line(self, text: str) -> list[int]:
        line, whole = self._ours("\n"), self._ours("\n" + text)
        return whole[len(line) :] if whole[: len(line)] == line else self._ours(text)

    def history(self, items: np.ndarray) -> list[int]:
        """The tokens of a history, oldest item first, to the end of its line."""
        if not len(items):
            return self.no_history
        return [token for item in items[:-1] for token in self.listed[item]] + [*self.last[items[-1]]]

    def candidates(self, items: np.ndarray) -> list[int]:
        """The tokens of the lines that list candidates."""
        ids: list[int] = []
        for place, item in enumerate(items):
            ids += [*self.open, *self.name(place), *self.close, *self.lines[item]]
        return ids

    def prompt(self, history: np.ndarray, candidates: np.ndarray, answer_length: int = 0) -> list[int]:
        """The tokens that a model reads before it answers.

        Raises ValueError where they do not fit with the answer, even without a history.
        """
        pieces, lines = self.pieces(len(candidates)), self.candidates(candidates)
        while True:
            shown = self.history(history)
            prefix, suffix = (_joined(parts, shown) for parts in pieces)
            ids = prefix + lines + suffix
            if len(ids) + answer_length <= self.settings.max_length:
                return ids
            if not len(history):
                raise ValueError(
                    f"A prompt with {len(candidates)} candidates has {len(ids) + answer_length} tokens even without a "
                    f"history, more than --method.prompts.max_length {self.settings.max_length}: raise it, or lower "
                    "--method.window or --method.prompts.title_tokens"
                )
            history = history[1:]

    def answer(self, order: Sequence[int]) -> list[int]:
        """The tokens of a whole permutation: places, best first."""
        ids = [*self.open]
        for index, place in enumerate(order):
            ids += [*(self.between if index else []), *self.name(place)]
        return [*ids, *self.close, *self.end]

    def one_prompt(self, history: np.ndarray) -> list[int]:
        """The tokens in front of a candidate that is judged alone."""
        first = "" if self.lead else "\n"
        head = self.start + self._ours(f"{self._frame()[0]}{ONE_HISTORY}{first}")
        return head + self.history(history) + self._behind_line(ONE_CANDIDATE)

    def one_ending(self, item: int) -> list[int]:
        """The tokens that judge a candidate alone, behind `one_prompt`."""
        return [*self.lines[item], *self._behind_line(ONE_QUESTION + self._frame()[1])]

    def verdicts(self) -> tuple[int, int]:
        """The tokens of yes and no behind `one_ending`; raises ValueError where they begin alike."""
        yes, no = (ids[0] for ids in encode_after(self.tokenizer, "\n", [YES, NO]))
        if yes == no:
            raise ValueError("the tokenizer writes yes and no alike: pass --method.mode logits")
        return yes, no

    @property
    def digest(self) -> str:
        """A hash of all that prompts are made of, beside history and candidates: text, frame and settings."""
        pieces = self.pieces(2)
        parts = (self.template, self._frame(), asdict(self.settings), pieces, self.titles)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _joined(parts: list[list[int]], between: list[int]) -> list[int]:
    """The parts with `between` in each gap."""
    ids = [*parts[0]]
    for part in parts[1:]:
        ids += between + part
    return ids


def cut_titles(tokenizer: PreTrainedTokenizerBase, titles: list[str], tokens: int) -> list[str]:
    """Titles of at most so many tokens, those of a half character left out."""
    encoded = encode(tokenizer, [f" {title}" for title in titles])
    return [
        title if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens])).rstrip("\N{REPLACEMENT CHARACTER}").strip()
        for title, ids in zip(titles, encoded, strict=True)
    ]
