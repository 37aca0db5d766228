"""Ranking prompts as tokens: titles are encoded once, and prompts are joined from tables."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .identifiers import Identifiers
from .prompt_tokens import Parts
from .ranking_prompts import BEFORE, CHOOSE, JOINT, NAME, POOL, RESPONSE, ranking_prompt
from .title_tokens import TokenTable, encode, encode_after, ends_of, ranges

# The table: two beginnings, the pool's heading, an index for each place in either list, titles with what closes them.
WITH_HISTORY, WITHOUT_HISTORY, POOL_HEADING, INDICES = range(4)
MIDDLE, END_OF_HISTORY, END_OF_PROMPT = range(3)
SLOT_TOKEN = 0  # where a vector stands, so it needs no id of its own


class RankingRows(NamedTuple):
    """Prompts as tokens."""

    tokens: TokenTable  # R sequences
    slots: np.ndarray | None  # [R, K] int64: the token of each row where an identifier's vector stands


class RankingEncoder:
    """Joins prompts from sequences that were encoded once, each in its context.

    Every cut is in front of a blank that brackets or words follow, where tokenizers do not merge:
    `...history:| (1)| Heat \\n| (2)| Fargo; \\n| Candidate pool:| (A)| Alien \\n| (B)| Big\\n\\n### Response:\\n`.
    Whatever follows a title up to the next cut is encoded together with it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        titles: Sequence[str],
        history_length: int,
        identifiers: Identifiers | None,
    ) -> None:
        """`titles` [N + 1] begin with that of padding. Without `identifiers` prompts show no candidates."""
        self.identifiers, self.num_titles = identifiers, len(titles)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.bos = np.array(bos, dtype=np.int32)
        before = BEFORE.format(instruction=NAME if identifiers is None else CHOOSE)
        alone = ranking_prompt([], None if identifiers is None else []).partition(POOL)[0]
        with_history, without = encode(tokenizer, [before, alone])
        (pool,) = encode_after(tokenizer, "\n", [POOL])
        numbers = [str(number) for number in range(1, history_length + 1)]
        indices = [*self._indices(tokenizer, numbers), *self._candidate_indices(tokenizer)]
        self.first_candidate_index = INDICES + history_length
        self.first_title = INDICES + len(indices)
        fixed = TokenTable.of([bos + with_history, bos + without, pool, *indices])
        closings = (JOINT, f";{JOINT}", RESPONSE)
        closed = [encode_after(tokenizer, ")", [f" {title}{closing}" for title in titles]) for closing in closings]
        self.table = TokenTable.stacked(fixed, *map(TokenTable.of, closed))

    def _indices(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> list[list[int]]:
        """` (1)`, ` (2)`, ...: the first behind a heading, the others behind a newline."""
        marked = [f" ({label})" for label in labels]
        return encode_after(tokenizer, ":", marked[:1]) + encode_after(tokenizer, "\n", marked[1:])

    def _candidate_indices(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The same for candidates; a slot stands between the brackets where identifiers are vectors."""
        self.slot_in_index = 0
        if self.identifiers is None:
            return []
        if self.identifiers.token_ids is not None:
            return self._indices(tokenizer, self.identifiers.labels)
        (opens,), (closes,) = encode_after(tokenizer, "\n", [" ("]), encode_after(tokenizer, "a", [")"])
        self.slot_in_index = len(opens)
        return [[*opens, SLOT_TOKEN, *closes]] * len(self.identifiers)

    def parts(self, history: np.ndarray, counts: np.ndarray, candidates: np.ndarray) -> Parts:
        """Rows as entries of the table.

        `history` [H] holds the rows' items one behind the other, oldest first, `counts` [R] how many each has, and
        `candidates` [R, K] what each offers, in the order of its identifiers.
        """
        num_rows, num_candidates = candidates.shape
        offers = self.identifiers is not None
        num_entries = 1 + 2 * counts + (1 + 2 * num_candidates if offers else 0)
        starts = ends_of(num_entries)
        entries = np.empty(starts[-1], dtype=np.int64)
        entries[starts[:-1]] = np.where(counts > 0, WITH_HISTORY, WITHOUT_HISTORY)
        row, number = np.repeat(np.arange(num_rows), counts), ranges(np.zeros_like(counts), counts)
        place = starts[row] + 1 + 2 * number
        entries[place] = INDICES + number
        closing = np.where(number == counts[row] - 1, END_OF_HISTORY if offers else END_OF_PROMPT, MIDDLE)
        entries[place + 1] = self._title(history, closing)
        if offers:
            heading = starts[:-1] + 1 + 2 * counts
            entries[heading] = POOL_HEADING
            column = np.arange(num_candidates)
            place = heading[:, None] + 1 + 2 * column
            entries[place] = self.first_candidate_index + column
            entries[place + 1] = self._title(candidates, np.where(column == num_candidates - 1, END_OF_PROMPT, MIDDLE))
        return Parts(self.table, entries, num_entries, num_entries)

    def encode(self, history: np.ndarray, counts: np.ndarray, candidates: np.ndarray) -> RankingRows:
        """Join the rows; see `parts`."""
        parts = self.parts(history, counts, candidates)
        if self.identifiers is None or self.identifiers.token_ids is not None:
            return RankingRows(parts.tokens(), None)
        ends, first = ends_of(self.table.lengths[parts.entries]), ends_of(parts.counts)
        index = first[1:, None] - 2 * np.arange(candidates.shape[1], 0, -1)  # the entry of each candidate's index
        return RankingRows(parts.tokens(), ends[index] - ends[first[:-1], None] + self.slot_in_index)

    def longest_without_history(self, num_candidates: int) -> int:
        """Tokens of a prompt that offers the longest titles to a user who has no history."""
        lengths = self.table.lengths
        if self.identifiers is None:
            return int(lengths[WITHOUT_HISTORY])
        titles = lengths[self.first_title :].reshape(-1, self.num_titles).max(axis=0)
        indices = lengths[self.first_candidate_index : self.first_candidate_index + num_candidates]
        heading = lengths[WITHOUT_HISTORY] + lengths[POOL_HEADING]
        return int(heading + indices.sum() + np.sort(titles)[-num_candidates:].sum())

    def cut_left(self, tokens: TokenTable, max_length: int) -> TokenTable:
        """The last tokens of each row behind its BOS, as published: an instruction that does not fit is lost."""
        kept = np.minimum(tokens.lengths, max_length) - len(self.bos)
        body = ranges(tokens.offsets[1:] - kept, kept)
        rows = [[*self.bos, *ids] for ids in np.split(tokens.ids[body], ends_of(kept)[1:-1])]
        return TokenTable.of(rows)

    def _title(self, items: np.ndarray, closing: np.ndarray) -> np.ndarray:
        return self.first_title + closing * self.num_titles + items
