"""Candidate prompts as tokens: every title is encoded once, and rows are joined from tables."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from .candidate_prompts import CandidateTexts, published_movie_title, texts_of_domain
from .candidate_rows import CandidateSettings
from .interactions import Catalog
from .prompts import title_texts
from .title_tokens import TokenTable, encode, encode_after, ends_of, ranges


class Shown(NamedTuple):
    """What each of R prompts shows. `titles` and `vectors` say how: text (True, False), id (False, True), both."""

    history: np.ndarray  # [H] int64, the histories one behind the other, oldest item first
    history_counts: np.ndarray  # [R] int64
    candidates: np.ndarray  # [R, C] int64, in the order of the prompt
    text: np.ndarray  # [R] int64, which text of the domain
    titles: np.ndarray  # [R] bool
    vectors: np.ndarray  # [R] bool
    answer: np.ndarray | None = None  # [R] int64, the item that the response names


class CandidateRows(NamedTuple):
    """Prompts as tokens, each followed by its response where there is one."""

    tokens: TokenTable  # R sequences
    context: np.ndarray  # [R] int64: leading tokens that are no response
    slot_row: np.ndarray  # [S] int64: the row of each item vector, ascending
    slot_offset: np.ndarray  # [S] int64: its token in that row
    slot_items: np.ndarray  # [S] int64


# A slot's token is read as the item's vector, so it needs no id of its own in the vocabulary.
SLOT_TOKEN = 0
# The table: entries of one kind, five pieces a text, then the titles in front of each thing that may close a list.
EMPTY, SLOT, COMMA, NEWLINE, PIECES = range(5)
BEFORE, BETWEEN, BETWEEN_TEXT, AFTER, AFTER_TEXT = range(5)
PLAIN = 0  # the closing of a title that a slot, a blank or the end follows


class CandidateEncoder:
    """Joins prompts from sequences that were encoded once: fixed pieces, and each title behind a blank.

    A slot stands for the blank and the marker of the printed prompt, so a vector costs one token; where a prompt shows
    no vectors there is no slot either, since the published placeholder carries nothing of the item. In front of a slot
    a title is made of the same tokens as in the response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: CandidateTexts, titles: Sequence[str]) -> None:
        """`titles` [N + 1] begin with that of padding; newlines in them, which would end an answer, become blanks."""
        self.tokenizer, self.texts, self.num_items = tokenizer, texts, len(titles) - 1
        self.item_titles = titles = [title.replace("\n", " ") for title in titles]
        # Without a slot behind it a title runs into what follows, up to the next blank: ",", "." or nothing.
        ends = [self._closings(text) for text in range(len(texts.texts))]
        closings = ["", ",", *sorted({end for pair in ends for end in pair} - {"", ","})]
        self.closing_of = np.array([[closings.index(end) for end in pair] for pair in ends])  # [texts, 2]
        self.comma = closings.index(",")
        self.titles = [
            TokenTable.of(encode_after(tokenizer, ",", [f" {title}{closing}" for title in titles]))
            for closing in closings
        ]
        (comma,), (newline,) = encode_after(tokenizer, "\n", [","]), encode_after(tokenizer, "a", ["\n"])
        self.fixed = TokenTable.of([[], [SLOT_TOKEN], comma, newline])
        # The response that names each item, [N + 1]. None is the start of another one, for only its end has a newline.
        self.responses = TokenTable.of([[*self.titles[PLAIN][item], *newline] for item in range(len(titles))])
        self.item_lengths = self.titles[PLAIN].lengths + 2  # tokens of an item in a list: also its slot and a comma
        self._tables: dict[int, TokenTable] = {}

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, catalog: Catalog, settings: CandidateSettings) -> Self:
        """The encoder of a catalogue's titles, as the settings want them written."""
        titles = title_texts(catalog)
        if settings.titles == "published-movie":
            titles = ["", *map(published_movie_title, titles[1:])]
        return cls(tokenizer, texts_of_domain(settings.domain), titles)

    def _closings(self, text: int) -> tuple[str, str]:
        pieces = self.texts.pieces(text, 0)
        return pieces.between.partition(" ")[0], pieces.after.partition(" ")[0]

    @property
    def _first_title(self) -> int:
        return PIECES + 5 * len(self.texts.texts)

    def table(self, num_candidates: int) -> TokenTable:
        """All entries for prompts with this number of candidates."""
        if num_candidates not in self._tables:
            pieces = [self._pieces(text, num_candidates) for text in range(len(self.texts.texts))]
            table = TokenTable.of([entry for entries in pieces for entry in entries])
            self._tables[num_candidates] = TokenTable.stacked(self.fixed, table, *self.titles)
        return self._tables[num_candidates]

    def fixed_length(self, num_candidates: int) -> int:
        """Tokens around the lists, of a middling text."""
        pieces = self.table(num_candidates).lengths[PIECES : self._first_title].reshape(-1, 5)
        return int(pieces[:, [BEFORE, BETWEEN, AFTER]].sum(axis=1).mean())

    def _pieces(self, text: int, num_candidates: int) -> list[list[int]]:
        before, between, after = self.texts.pieces(text, num_candidates)
        end_of_history, end_of_candidates = self._closings(text)
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        (head,) = encode(self.tokenizer, [before.rstrip(" ")])
        # Titles and slots bring the blank in front of them along.
        behind_slots = encode_after(self.tokenizer, "\n", [between.rstrip(" "), after])
        cut = [between.removeprefix(end_of_history).rstrip(" "), after.removeprefix(end_of_candidates)]
        behind_titles = encode_after(self.tokenizer, ",", cut)
        return [bos + head, behind_slots[0], behind_titles[0], behind_slots[1], behind_titles[1]]

    def encode(self, shown: Shown) -> CandidateRows:
        """Join the rows."""
        table = self.table(shown.candidates.shape[1])
        entries, starts, slots, slot_items = self._entries(shown)
        lengths = table.lengths[entries]
        ends = ends_of(lengths)
        ids = table.ids[ranges(table.offsets[entries], lengths)]
        row_ends = ends[starts]
        slot_row = np.searchsorted(starts, slots, side="right") - 1
        context = ends[starts[1:] - 2] - row_ends[:-1]
        return CandidateRows(TokenTable(row_ends, ids), context, slot_row, ends[slots] - row_ends[slot_row], slot_items)

    def _entries(self, shown: Shown) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Table entries of all rows, where each row starts, [R + 1], which entries are slots, [S], and their items.

        A row is: before, (comma, title, slot) of each history item, between, the same of each candidate, after, the
        title of the answer, newline. What a prompt leaves out is an empty entry.
        """
        num_rows, num_candidates = shown.candidates.shape
        counts = shown.history_counts + num_candidates
        row = np.repeat(np.arange(num_rows), counts)
        index, history_count = ranges(np.zeros_like(counts), counts), shown.history_counts[row]
        in_history = index < history_count
        item = np.empty(len(row), dtype=np.int64)
        item[in_history], item[~in_history] = shown.history, shown.candidates.ravel()
        first = (index == 0) | (index == history_count)
        last = (index == history_count - 1) | (index == counts[row] - 1)

        text_only = shown.titles & ~shown.vectors
        closing = np.where(last, self.closing_of[shown.text[row], (~in_history).astype(int)], self.comma)
        closing = np.where(text_only[row], closing, PLAIN)
        starts = ends_of(5 + 3 * counts)
        entries = np.full(starts[-1], EMPTY, dtype=np.int64)
        place = starts[row] + 1 + 3 * index + ~in_history
        entries[place] = np.where(first | text_only[row], EMPTY, COMMA)
        entries[place + 1] = np.where(shown.titles[row], self._title(item, closing), EMPTY)
        entries[place + 2] = np.where(shown.vectors[row], SLOT, EMPTY)

        piece, base = PIECES + 5 * shown.text, starts[:-1]
        entries[base] = piece + BEFORE
        cut = text_only & (shown.history_counts > 0)  # an empty list leaves its closing to the piece
        entries[base + 1 + 3 * shown.history_counts] = piece + np.where(cut, BETWEEN_TEXT, BETWEEN)
        entries[base + 2 + 3 * counts] = piece + np.where(text_only, AFTER_TEXT, AFTER)
        if shown.answer is not None:
            entries[starts[1:] - 2] = self._title(shown.answer, PLAIN)
            entries[starts[1:] - 1] = NEWLINE
        has_slot = shown.vectors[row]
        return entries, starts, (place + 2)[has_slot], item[has_slot]

    def _title(self, item: np.ndarray, closing: np.ndarray | int) -> np.ndarray:
        return self._first_title + closing * (self.num_items + 1) + item
