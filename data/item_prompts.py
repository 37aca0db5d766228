"""Prompts in which a vector stands for each item: an instruction, one slot an item (its title may follow), a response.

The pieces of text are tokenised once, each by itself, as E4SRec does (arXiv 2312.02443); rows are joined from tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .batches import SequenceBatch, on_device, padded_length, sequences_of
from .interactions import Catalog
from .prompts import title_texts
from .title_tokens import TokenTable, encode

INSTRUCTION = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nGiven the user\u2019s purchase history, "
    "predict next possible item to be purchased.\n\n### Input:\n"
)
RESPONSE = "\n### Response:\n"


@dataclass
class ItemPromptSettings:
    """Text around the items, and which of them a prompt shows."""

    instruction: str = INSTRUCTION
    """Text before the items."""
    response: str = RESPONSE
    """Text behind the items, in mode prefix; its last token is read."""
    titles: bool = False
    """Let the title of an item follow its vector: ID and text."""
    bos: bool = False
    """Begin with the tokenizer's BOS token, which the published code leaves out."""
    mode: Literal["auto", "positions", "prefix"] = "auto"
    """positions: one causal pass over a history trains every next item, each read where the item before it ends.
    prefix: one prompt a target, closed by the response, as published. auto: positions where the backbone is causal."""
    max_history: int = 50
    """Most recent items that a prompt shows."""
    max_targets: int = 50
    """Mode prefix: how many of a user's last training items are targets."""
    empty_history: bool = False
    """Also train the first item of a user, from the instruction alone, as the published code does."""
    published_padding: bool = False
    """Mode prefix: pads stand between instruction and items and take positions, and padding is a class, as in the
    published code (to compare with it only)."""

    def __post_init__(self) -> None:
        for name in ("max_history", "max_targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"--method.prompts.{name} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True)
class ItemPromptBatch:
    """Prompts padded on the right. Slots are indices into `input_ids.flatten()`."""

    input_ids: Tensor  # [B, L] int64, padding where a vector stands
    attention_mask: Tensor | None  # [B, L] int64; None where the causal mask does
    item_slots: Tensor  # [S] int64, ascending: where the vector of an item stands
    slot_items: Tensor  # [S] int64: those items
    labelled: Tensor  # [T] int64: slots that are read; in evaluation one a row
    targets: Tensor | None = None  # [T] int64, training only: the items to be read there
    prefix_ids: Tensor | None = None  # [P] int64: tokens that all rows begin with, left out of `input_ids`
    negatives: Tensor | None = None  # [K] int64, shared by all labels
    log_expected: Tensor | None = None  # [K] float32: log of how often K draws are expected to bring each
    row: Tensor | None = None  # [B] int64, evaluation only: index into split.targets(phase)
    history: SequenceBatch | None = None  # the same items, for models that also hold an ID recommender
    count: int = 0

    def to(self, device: torch.device) -> "ItemPromptBatch":
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> "ItemPromptBatch":
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        assert self.targets is not None
        return replace(self, labelled=self.labelled[:0], targets=self.targets[:0], count=0)


@dataclass(frozen=True)
class ItemPromptLayout:
    """The tokens around items, and how rows are built from them."""

    before: np.ndarray  # [P] int64, never empty
    after: np.ndarray  # [A] int64: closes a prompt; empty where every position is trained
    trains_every_position: bool
    titles: TokenTable | None  # what stands behind an item's vector, by item
    shares_prefix: bool  # a batch holds `before` once, but for its last token
    causal: bool  # what stands on the right is not seen, so pads need no mask
    published_padding: bool = False
    with_history: bool = False  # batches carry their items as sequences, too

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        catalog: Catalog,
        settings: ItemPromptSettings,
        *,
        causal: bool,
        shares_prefix: bool,
        gated: bool = False,
        with_history: bool = False,
    ) -> "ItemPromptLayout":
        """Encode the pieces. Raises ValueError where settings do not go together, naming the flags.

        `gated` says that the backbone adapts to the user of each row, so that no tokens are shared by several.
        """
        if settings.mode == "positions" and gated:
            raise ValueError(
                "--method.prompts.mode positions reads many states of a user in one pass, and a gate is made from one "
                "of them: pass --method.prompts.mode prefix, or --backbone.adapter lora"
            )
        if settings.mode == "positions" and not causal:
            raise ValueError(
                "--method.prompts.mode positions needs a causal backbone, and this one sees what follows: pass "
                "--backbone.causal true or --method.prompts.mode prefix"
            )
        every_position = settings.mode == "positions" or (settings.mode == "auto" and causal and not gated)
        if settings.published_padding and every_position:
            raise ValueError("--method.prompts.published_padding true needs --method.prompts.mode prefix")
        before, after = encode(tokenizer, [settings.instruction, settings.response])
        before = [tokenizer.bos_token_id] * settings.bos + before
        if not before or None in before:
            raise ValueError(
                "a prompt begins with at least one token: set --method.prompts.instruction, or --method.prompts.bos "
                "with a tokenizer that has a BOS token"
            )
        titles = None
        if settings.titles:
            titles = TokenTable.of([[], *encode(tokenizer, [f" ({title})," for title in title_texts(catalog)[1:]])])
        return cls(
            np.array(before, np.int64),
            np.array([] if every_position else after, np.int64),
            every_position,
            titles,
            shares_prefix=shares_prefix and causal and not gated and not settings.published_padding,
            causal=causal and not settings.published_padding,
            published_padding=settings.published_padding,
            with_history=with_history,
        )

    def lengths(self, items_per_row: Sequence[np.ndarray]) -> np.ndarray:
        """Tokens of each row, [B]."""
        around = 1 if self.shares_prefix else len(self.before)
        titles = [0 if self.titles is None else int(self.titles.lengths[items].sum()) for items in items_per_row]
        return np.array(
            [around + len(items) + more + len(self.after) for items, more in zip(items_per_row, titles, strict=True)]
        )

    def batch(self, histories: Sequence[np.ndarray]) -> tuple[ItemPromptBatch, np.ndarray, np.ndarray]:
        """Return the rows of some histories without labels, the slot where each item ends [S], and where each row does.

        Where an item ends is the token before the next item: its own vector, or its title's last token.
        """
        before = self.before[-1:] if self.shares_prefix else self.before
        gaps = self._gaps(histories)
        lengths = self.lengths(histories) + gaps
        ids = np.zeros((len(histories), padded_length(int(lengths.max()))), np.int64)
        mask = np.zeros_like(ids)
        slots, ends = [], []
        for i, (items, gap) in enumerate(zip(histories, gaps, strict=True)):
            first = len(before) + gap
            ids[i, : len(before)] = before
            sizes = np.ones(len(items), np.int64)
            if self.titles is not None:
                sizes += self.titles.lengths[items]
            behind = first + np.cumsum(sizes)
            slots.append(i * ids.shape[1] + behind - sizes)
            ends.append(i * ids.shape[1] + behind - 1)
            if self.titles is not None:
                for item, end, size in zip(items, behind, sizes, strict=True):
                    ids[i, end - size + 1 : end] = self.titles[item]
            ids[i, lengths[i] - len(self.after) : lengths[i]] = self.after
            mask[i, : len(before)] = mask[i, first : lengths[i]] = 1
        items = np.concatenate([np.asarray(items, np.int64) for items in histories])
        counts = np.array([len(history) for history in histories], np.int64)
        batch = ItemPromptBatch(
            torch.from_numpy(ids),
            None if self.causal else torch.from_numpy(mask),
            torch.from_numpy(np.concatenate(slots)),
            torch.from_numpy(items),
            torch.zeros(0, dtype=torch.int64),
            prefix_ids=torch.from_numpy(self.before[:-1]) if self.shares_prefix and len(self.before) > 1 else None,
            history=sequences_of(items, counts) if self.with_history else None,
        )
        return batch, np.concatenate(ends), np.arange(len(ids)) * ids.shape[1] + lengths - 1

    def _gaps(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        """Pads between instruction and items, [B]; the published code fills up to the longest, at least two."""
        if not self.published_padding:
            return np.zeros(len(histories), np.int64)
        sizes = np.array([len(items) for items in histories])
        return max(2, int(sizes.max())) - sizes
