"""What the stages of LLM2Vec learn from: the texts that dense retrieval will read, or the lines of a file."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from .retrieval_texts import RetrievalTexts, RetrievalTextSettings, special_tokens
from .splits import Split
from .title_tokens import TokenTable, encode

MOST_HELD_OUT = 0.1  # of all texts


@dataclass
class CorpusSettings(RetrievalTextSettings):
    """How the texts read, and where they come from."""

    file: Path | None = None
    """A text file to learn from, one text a line (a longer one than max_length becomes several), instead of the
    catalogue's items and the users' training histories."""
    held_out: int = 1000
    """Texts that are kept from training to measure the loss on, at most a tenth of all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.held_out < 1:
            raise ValueError(f"--method.texts.held_out is {self.held_out}, but must be at least 1")


@dataclass(frozen=True)
class Corpus:
    """Distinct texts as tokens; what stands in front of a text and behind it says nothing about it."""

    texts: TokenTable  # [S]
    before: np.ndarray  # [S] int64: tokens of each that are special ones or a prefix
    after: int  # special tokens at the end of each

    @classmethod
    def of_catalog(cls, split: Split, texts: RetrievalTexts) -> Self:
        """Every item of the catalogue but cold ones, and every user's training events in windows of `max_history`.

        Nothing that validation or test asks for is in a history.
        """
        window = texts.settings.max_history
        items = (texts.item(item) for item in range(1, texts.num_items + 1) if item not in split.cold_items)
        sequences = (split.training_items(user) for user in range(split.num_users))
        cuts = (np.split(events, range(len(events) % window or window, len(events), window)) for events in sequences)
        users = (texts.user(events) for windows in cuts for events in windows if len(events))
        parts = [(len(texts.item_start), items), (len(texts.user_start), users)]
        return cls._of_distinct(((before, text) for before, part in parts for text in part), len(texts.end))

    @classmethod
    def of_file(cls, path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Self:
        """The lines of a file that are not blank. Raises ValueError where it cannot be read."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--method.texts.file {path} cannot be read as text: {error}") from error
        first, last = special_tokens(tokenizer)
        room = max_length - len(first) - len(last)
        encoded = encode(tokenizer, [line for line in lines if line])
        pieces = (ids[i : i + room] for ids in encoded for i in range(0, len(ids), room))
        return cls._of_distinct(((len(first), np.array([*first, *piece, *last])) for piece in pieces), len(last))

    @classmethod
    def _of_distinct(cls, texts: Iterable[tuple[int, np.ndarray]], after: int) -> Self:
        """Equal texts come once: one of them may be held out, and in a batch they are no negatives."""
        distinct = {text.astype(np.int32).tobytes(): before for before, text in texts}
        if len(distinct) < 2:
            raise ValueError(f"--method.texts gives {len(distinct)} distinct texts: one is trained, and one held out")
        tokens = TokenTable.of([np.frombuffer(text, np.int32) for text in distinct])  # type: ignore[misc]
        return cls(tokens, np.fromiter(distinct.values(), np.int64), after)

    def hold_out(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the texts to train and those that are held out, at most `count`, as a function of the seed."""
        order = np.random.default_rng(seed).permutation(len(self.texts))
        held_out = max(1, min(count, int(MOST_HELD_OUT * len(order))))
        return np.sort(order[held_out:]), np.sort(order[:held_out])
