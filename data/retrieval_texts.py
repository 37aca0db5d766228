"""Users and items as texts of one kind: a prefix with the titles of a history, or with one item's title."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from .interactions import Catalog
from .prompts import title_texts
from .texts import TextBatch
from .title_tokens import TokenTable, encode


@dataclass
class RetrievalTextSettings:
    """How a user and an item read."""

    user_prefix: str = "user history:"
    """Text before the titles of a history."""
    item_prefix: str = "item:"
    """Text before the title of an item."""
    pool_prefix: bool = False
    """Pool the prefix (and what the tokenizer puts before it), too; false: it is only read."""
    categories: bool = False
    """Let an item's categories follow its title, on the item side."""
    max_history: int = 50
    """Most recent items that a user's text shows."""
    max_length: int = 256
    """Tokens of a text, at most: a history loses its oldest titles, an item the end of its text."""

    def __post_init__(self) -> None:
        if self.max_history < 1:
            raise ValueError(f"--method.texts.max_history is {self.max_history}, but must be at least 1")


@dataclass(frozen=True)
class RetrievalTexts:
    """The tokens of every title, made once, and how texts are joined from them."""

    user_start: np.ndarray  # [P] what a user's text begins with
    item_start: np.ndarray  # [Q] what an item's text begins with
    separator: np.ndarray  # between titles
    end: np.ndarray  # what a text ends with
    titles: TokenTable  # [N + 1] as a history shows them
    items: TokenTable  # [N + 1] as the text of an item shows them
    settings: RetrievalTextSettings

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        catalog: Catalog,
        settings: RetrievalTextSettings,
        *,
        ends: bool = False,
    ) -> Self:
        """Encode the pieces; `ends` asks for a last token that is the same for all texts.

        Raises ValueError where the longest title does not fit into `max_length` beside a prefix.
        """
        before, after = special_tokens(tokenizer)
        if ends and not after and tokenizer.eos_token_id is not None:
            after = [tokenizer.eos_token_id]
        user_prefix, item_prefix, separator = encode(tokenizer, [settings.user_prefix, settings.item_prefix, ";"])
        described = title_texts(catalog)
        titles = item_texts = TokenTable.of([[], *encode(tokenizer, [f" {title}" for title in described[1:]])])
        if settings.categories:
            named = zip(described[1:], catalog.categories[1:], strict=True)
            full = [f" {title} ({', '.join(names)})" if names else f" {title}" for title, names in named]
            item_texts = TokenTable.of([[], *encode(tokenizer, full)])
        starts = [np.array(before + prefix, np.int64) for prefix in (user_prefix, item_prefix)]
        between, end = np.array(separator, np.int64), np.array(after, np.int64)
        texts = cls(starts[0], starts[1], between, end, titles, item_texts, settings)
        needed = max(map(len, starts)) + int(titles.lengths.max()) + len(after)
        if settings.max_length < needed:
            raise ValueError(
                f"--method.texts.max_length {settings.max_length} cannot hold a prefix and the longest title: pass at "
                f"least {needed}"
            )
        return texts

    @property
    def num_items(self) -> int:
        return len(self.items) - 1

    def user(self, history: np.ndarray) -> np.ndarray:
        """Return the tokens of a history, oldest title first: as many of its newest ones as there is room for."""
        history = history[-self.settings.max_history :]
        room = self.settings.max_length - len(self.user_start) - len(self.end) + len(self.separator)
        sizes = self.titles.lengths[history] + len(self.separator)
        newest = history[np.cumsum(sizes[::-1])[::-1] <= room]
        pieces = [piece for item in newest for piece in (self.separator, self.titles[item])][1:]
        return np.concatenate([self.user_start, *pieces, self.end])

    def item(self, item: int) -> np.ndarray:
        """Return the tokens of an item."""
        room = self.settings.max_length - len(self.item_start) - len(self.end)
        return np.concatenate([self.item_start, self.items[item][:room], self.end])

    def user_batches(self, histories: Sequence[np.ndarray], rows: int | None = None) -> tuple[TextBatch, ...]:
        """Return the texts of some histories, at most `rows` a batch."""
        return self._batches([self.user(history) for history in histories], self.user_start, rows)

    def item_batches(self, items: np.ndarray, rows: int | None = None) -> tuple[TextBatch, ...]:
        """Return the texts of some items, at most `rows` a batch."""
        return self._batches([self.item(int(item)) for item in items], self.item_start, rows)

    def _batches(self, texts: list[np.ndarray], start: np.ndarray, rows: int | None) -> tuple[TextBatch, ...]:
        rows = rows or len(texts)
        skipped = 0 if self.settings.pool_prefix else len(start)
        return tuple(TextBatch.of(texts[i : i + rows], skipped) for i in range(0, len(texts), rows))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return what a tokenizer puts before and behind every text: [CLS] and [SEP], BOS and nothing, ..."""
    whole, (inner,) = tokenizer("a")["input_ids"], encode(tokenizer, ["a"])
    first = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:first], whole[first + len(inner) :]
