"""What names a candidate in a prompt, and the one token that a model writes to choose it."""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np
from transformers import PreTrainedTokenizerBase

from .title_tokens import encode

LETTERS = tuple(ascii_uppercase)


@dataclass(frozen=True)
class Identifiers:
    """K names of candidates; without tokens each is a learned vector, which stands for it in prompt and answer."""

    labels: tuple[str, ...]
    token_ids: np.ndarray | None  # [K] int64

    def __len__(self) -> int:
        return len(self.labels)


class NotOneToken(ValueError):
    """A tokenizer does not write an identifier as one token of its own behind the prompt."""


def resolve(tokenizer: PreTrainedTokenizerBase, prompt: str, labels: Sequence[str]) -> np.ndarray:
    """The token that each label gets behind `prompt`, [K] int64: what training shows is what scoring reads.

    A tokenizer may give a letter another token alone than behind a newline (Llama-2: 319 and 29909 for A), so a
    label is never encoded alone. Raises NotOneToken, naming the label, unless each label adds exactly one token to the
    prompt's own, and no two labels the same one.
    """
    (before,) = encode(tokenizer, [prompt])
    ids: list[int] = []
    for label, tokens in zip(labels, encode(tokenizer, [prompt + label for label in labels]), strict=True):
        if len(tokens) != len(before) + 1 or tokens[:-1] != before:
            raise NotOneToken(
                f"behind {prompt[-20:]!r} the tokenizer writes the identifier {label!r} as "
                f"{tokenizer.convert_ids_to_tokens(tokens[len(before) :])}, not as one token"
            )
        ids.append(tokens[-1])
    if len(set(ids)) < len(ids):
        raise NotOneToken(f"the tokenizer writes several of {', '.join(labels)} as the same token")
    return np.array(ids, dtype=np.int64)


def encoded_alone(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> np.ndarray:
    """The first token of each label encoded by itself, [K] int64: what LlamaRec's published code reads.

    Only to compare with it: on Llama-2 these are not the tokens that it trains.
    """
    return np.array([tokens[0] for tokens in encode(tokenizer, list(labels))], dtype=np.int64)
