"""From rows to tokens: prompts are joined from pieces that were encoded once."""

import logging
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from .interactions import Catalog
from .prompt_rows import PromptSettings, ResponseRows, Rows, dense_rows, evaluation_rows
from .prompts import template_by_name, title_texts
from .splits import Phase, Split
from .title_tokens import TitleTokens, TokenTable, encode, encode_after, ends_of, ranges

logger = logging.getLogger("shardrec")


class Parts(NamedTuple):
    """Rows as entries of a table: row r joins the next counts[r]; the first context[r] are no labels."""

    table: TokenTable
    entries: np.ndarray  # [P] int64
    counts: np.ndarray  # [R] int64
    context: np.ndarray  # [R] int64

    def tokens(self) -> TokenTable:
        """The rows, as one sequence each."""
        starts, lengths = self.table.offsets[self.entries], self.table.lengths[self.entries]
        return TokenTable(ends_of(lengths)[ends_of(self.counts)], self.table.ids[ranges(starts, lengths)])

    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, [R]."""
        return np.diff(ends_of(self.table.lengths[self.entries])[ends_of(self.counts)])

    def context_lengths(self) -> np.ndarray:
        """Leading tokens of each row that are no labels, [R]."""
        ends, starts = ends_of(self.table.lengths[self.entries]), ends_of(self.counts)[:-1]
        return ends[starts + self.context] - ends[starts]


# The encoder's table: the prompt without a history, the text in front of one, then titles at each place.
ALONE, LEAD, TITLES = 0, 1, 2


class PromptEncoder:
    """Makes rows by joining sequences that were encoded once: fixed text, and each title at each place.

    This equals encoding every prompt as a whole; it is tried with every title when the encoder is made. Where
    it does not hold (`spliced` is False) prompts are encoded one by one, which is much slower.
    """

    def __init__(
        self,
        split: Split,
        catalog: Catalog,
        tokenizer: PreTrainedTokenizerBase,
        settings: PromptSettings,
    ) -> None:
        self.split, self.tokenizer, self.settings = split, tokenizer, settings
        self.template = template_by_name(settings.template)
        self.texts = title_texts(catalog)
        self.titles = TitleTokens.build(tokenizer, catalog, self.template)
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.table = self._dense_table() if settings.mode == "dense" else self._response_table()
        self.spliced = True
        if settings.mode == "response" and not self._splicing_is_exact():
            self.spliced = False
            logger.warning("The tokenizer merges titles with the text around them: a slower build.")

    def rows(self, phase: Phase | Literal["train"]) -> tuple[Rows | ResponseRows, int]:
        """All rows of a phase, and how many lost titles already; raises ValueError when there are none."""
        rows: Rows | ResponseRows
        shortened = 0
        if phase != "train":
            rows = evaluation_rows(self.split, self.settings, phase)
        elif self.settings.mode == "response":
            rows = ResponseRows(self.split, self.settings)
        else:
            room = self.settings.max_length - int(self.table.lengths[ALONE])
            rows, shortened = dense_rows(self.split, self.settings, self.titles.lengths, room)
        if not rows.total:
            remedy = (
                f"no user has more training events than --method.prompts.min_history {self.settings.min_history}"
                if phase == "train"
                else "the split holds out no event for it; see --data.split, --data.user_core and --data.min_rating"
            )
            raise ValueError(f"{self.split.name}: no {phase} prompts; {remedy}.")
        return rows, shortened

    def encode(self, rows: Rows) -> tuple[TokenTable, np.ndarray, np.ndarray]:
        """The tokens of each row; how many are no labels, [R]; whether the row lost its oldest titles, [R].

        Raises ValueError when a row is longer than `max_length` even without a history.
        """
        start = rows.start.copy()
        parts = self._parts_of(rows)
        long = np.flatnonzero(parts.row_lengths() > self.settings.max_length)
        while len(long):
            stuck = long[start[long] == rows.position[long]]
            if len(stuck):
                raise self.settings.no_room(int(rows.user[stuck[0]]), int(rows.position[stuck[0]]))
            start[long] += 1
            lengths = self._parts_of(rows._replace(start=start).take(long)).row_lengths()
            long = long[lengths > self.settings.max_length]
        lost = start > rows.start
        if lost.any():
            parts = self._parts_of(rows._replace(start=start))
        return parts.tokens(), parts.context_lengths(), lost

    def _parts_of(self, rows: Rows) -> Parts:
        offset = self.split.offsets[rows.user]
        return self._parts(self.split.items, rows.start + offset, rows.position + offset, rows.stop + offset)

    def _parts(self, items: np.ndarray, start: np.ndarray, position: np.ndarray, stop: np.ndarray) -> Parts:
        """Rows that read items[start:position] and answer items[position:stop]."""
        if self.spliced:
            table, titles = self.table, TITLES
            heads = np.where(position > start, LEAD, ALONE)
        else:
            whole = self._whole_prompts([items[a:b] for a, b in zip(start, position, strict=True)])
            table, titles = TokenTable.stacked(whole, self.titles), len(whole)
            heads, start = np.arange(len(whole)), position  # the heads hold the histories
        counts = 1 + stop - start
        slot = ranges(np.zeros_like(counts), counts)  # 0 is the head, then come the titles
        newest = np.repeat(position - start, counts)  # slot of the last title of the history
        place = np.where(slot <= newest, 1 + 2 * (slot == 1) + (slot == newest), 0)
        item = items[ranges(start - 1, counts)]  # one slot early; what it says of the head is overwritten
        entries = titles + place * len(self.titles) + item
        entries[ends_of(counts)[:-1]] = heads
        return Parts(table, entries, counts, 1 + position - start)

    def _dense_table(self) -> TokenTable:
        """A title is written in the history as in an answer, at every place."""
        (alone,) = encode(self.tokenizer, [self.template.alone])
        return TokenTable.stacked(TokenTable.of([self.bos + alone] * 2), *[self.titles] * 5)

    def _response_table(self) -> TokenTable:
        """Titles as answers, then in a history: in its middle, as its newest, its oldest, and its only title.

        Cut in front of blanks, where tokenizers do not merge: `...movies| before:"Heat",| "Fargo"...`.
        """
        before, separator, after = self.template.before, self.template.separator, self.template.after
        lead = before[: max(before.rfind(" "), 0)]
        joint = separator.rstrip(" ")
        oldest_opens, others_open = before[len(lead) :], separator[len(joint) :]
        places = []
        for behind, opens in ((joint, others_open), (lead.rpartition("\n")[2], oldest_opens)):
            for closes in (joint, after):
                texts = [opens + self.template.response(title) + closes for title in self.texts[1:]]
                places.append(TokenTable.of([[], *encode_after(self.tokenizer, behind, texts)]))
        heads = encode(self.tokenizer, [self.template.alone, lead])
        return TokenTable.stacked(TokenTable.of([self.bos + head for head in heads]), self.titles, *places)

    def _splicing_is_exact(self) -> bool:
        """Compare with whole prompts that hold every title, and some titles at every place."""
        items = np.arange(1, len(self.titles))
        some = items[:512]
        histories = [*_chunks(some, 1), *_chunks(some, 2), *_chunks(items, 9)]
        return all(self._equals_whole(histories[i : i + 512]) for i in range(0, len(histories), 512))

    def _equals_whole(self, histories: list[np.ndarray]) -> bool:
        ends = ends_of(np.array([len(history) for history in histories]))
        spliced = self._parts(np.concatenate(histories), ends[:-1], ends[1:], ends[1:]).tokens()
        whole = self._whole_prompts(histories)
        return np.array_equal(spliced.offsets, whole.offsets) and np.array_equal(spliced.ids, whole.ids)

    def _whole_prompts(self, histories: list[np.ndarray]) -> TokenTable:
        prompts = [self.template.prompt([self.texts[item] for item in history]) for history in histories]
        return TokenTable.of([self.bos + ids for ids in encode(self.tokenizer, prompts)])


def _chunks(items: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(items, range(size, len(items), size))
