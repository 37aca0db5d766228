"""Token sequences in one flat table, and the one that names each item: its title as an answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from .interactions import Catalog
from .prompts import Template, title_texts


@dataclass(frozen=True)
class TokenTable:
    """Token sequences one behind the other: sequence i is ids[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray  # [S + 1] int64
    ids: np.ndarray  # [T] int32

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Self:
        lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
        ids = np.fromiter((token for sequence in sequences for token in sequence), np.int32, lengths.sum())
        return cls(ends_of(lengths), ids)

    @staticmethod
    def stacked(*tables: "TokenTable") -> "TokenTable":
        """The sequences of all tables, in their order."""
        lengths = np.concatenate([table.lengths for table in tables])
        return TokenTable(ends_of(lengths), np.concatenate([table.ids for table in tables]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, [S]."""
        return np.diff(self.offsets)


class TitleTokens(TokenTable):
    """The answer that names each item, as tokens; sequence i belongs to item i and ends with EOS, [N + 1].

    A title is encoded as it stands behind a newline. No sequence is the start of another one, since EOS is
    only at the end; items with equal titles have equal sequences. Entry 0, padding, is EOS alone.
    """

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, catalog: Catalog, template: Template) -> Self:
        """Encode the answers of a template; raises ValueError when the tokenizer has no EOS token."""
        if tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer {tokenizer.name_or_path!r} has no EOS token to end a title.")
        responses = [template.response(title) for title in title_texts(catalog)[1:]]
        end = [tokenizer.eos_token_id]
        return cls.of([end, *(ids + end for ids in encode_after(tokenizer, "\n", responses))])

    def without_end(self) -> TokenTable:
        """The same sequences without EOS, which says nothing about the item."""
        keep = np.ones(len(self.ids), dtype=bool)
        keep[self.offsets[1:] - 1] = False
        return TokenTable(self.offsets - np.arange(len(self.offsets)), self.ids[keep])


def ends_of(lengths: np.ndarray) -> np.ndarray:
    """0, then the running total of the lengths."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... (as many as its length) of every pair, one behind the other."""
    ends = ends_of(lengths)
    return np.repeat(starts - ends[:-1], lengths) + np.arange(ends[-1])


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of each text; a title that spells a special token, such as </s>, is plain text."""
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def encode_after(tokenizer: PreTrainedTokenizerBase, lead: str, texts: list[str]) -> list[list[int]]:
    """Tokens of each text as it stands behind `lead`; alone, where its tokens merge with the lead's."""
    (prefix,) = encode(tokenizer, [lead])
    in_context = encode(tokenizer, [lead + text for text in texts])
    tokens = [ids[len(prefix) :] for ids in in_context]
    merged = [i for i, ids in enumerate(in_context) if ids[: len(prefix)] != prefix]
    for i, ids in zip(merged, encode(tokenizer, [texts[i] for i in merged]), strict=True):
        tokens[i] = ids
    return tokens
