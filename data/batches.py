"""What a model receives: typed batches and the examples that they are collated from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .negatives import UniformNegatives
from .splits import Phase, Split
from .title_tokens import TitleTokens

NO_LABEL = -100


@dataclass(frozen=True)
class SequenceBatch:
    """Item histories, padded on the right with 0.

    Right padding makes the causal mask the only mask that is needed: a real position never sees a pad.
    """

    items: Tensor  # [B, L] int64
    lengths: Tensor  # [B] int64
    labelled: Tensor | None = None  # [T] int64, training only: slots of items.flatten() whose next item is a label
    targets: Tensor | None = None  # [T] int64, those next items
    negatives: Tensor | None = None  # [B, K] int64, items the user has not seen, shared by the positions of a row
    row: Tensor | None = None  # [B] int64, evaluation only: index into split.targets(phase)
    count: int = 0  # labels in this batch

    def to(self, device: torch.device) -> "SequenceBatch":
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> "SequenceBatch":
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        assert self.labelled is not None
        assert self.targets is not None
        return replace(self, labelled=self.labelled[:0], targets=self.targets[:0], count=0)


def padded_length(longest: int, most: int | None = None) -> int:
    """Return the length to pad a batch to: one of eight in an octave, and not above `most` where `longest` is not.

    So batches have few shapes. oneDNN builds a kernel for each new shape of a bfloat16 product, and on CPUs with AMX
    that takes longer than most of our products.
    """
    step = 1 << max(0, longest.bit_length() - 4)
    padded = -(-longest // step) * step
    return padded if most is None else max(longest, min(padded, most))


def sequences_of(items: np.ndarray, lengths: np.ndarray) -> SequenceBatch:
    """Return histories that stand one behind the other, [sum of lengths], as rows no longer than the longest one.

    They go through models that know a window only.
    """
    padded = np.zeros((len(lengths), max(1, int(lengths.max()))), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = items
    return SequenceBatch(torch.from_numpy(padded), torch.from_numpy(lengths))


@dataclass(frozen=True)
class PromptBatch:
    """Tokenised prompts. Training pads on the right; evaluation pads on the left, so that generation can go on.

    Slots are indices into `input_ids.flatten()`.
    """

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64
    labelled: Tensor | None = None  # [T] int64, training only: slots that a label stands behind
    targets: Tensor | None = None  # [T] int64, those labels: the next tokens, or the items whose titles start there
    item_slots: Tensor | None = None  # [S] int64: where an item's vector stands instead of a token's
    slot_items: Tensor | None = None  # [S] int64: those items
    candidates: Tensor | None = None  # [B, C] int64: the items that a prompt offers
    row: Tensor | None = None  # [B] int64, evaluation only: index into split.targets(phase)
    history: SequenceBatch | None = None  # the same rows as item ids, for models that also hold an ID recommender
    shared: int = 0  # training only: tokens that all rows of all batches begin with, none of which has a label
    count: int = 0

    def to(self, device: torch.device) -> "PromptBatch":
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> "PromptBatch":
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        assert self.labelled is not None
        assert self.targets is not None
        return replace(self, labelled=self.labelled[:0], targets=self.targets[:0], count=0)


class Batch(Protocol):
    """What loop, loaders and evaluator ask of a batch; each method knows its own."""

    @property
    def row(self) -> Tensor | None:
        """[B] int64, evaluation only: index into split.targets(phase)."""
        ...

    @property
    def count(self) -> int:
        """Labels in this batch."""
        ...

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""
        ...

    def muted(self) -> Self:
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class Examples(Protocol):
    """A random-access source of examples that knows its lengths, so that loaders can group them."""

    lengths: np.ndarray  # [n] int64, tokens or events of each example

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> Batch:
        """Return the batch of these examples.

        `epoch` only seeds what is drawn anew in each epoch; `progress` is how many epochs, with the part of this one,
        were trained before the batch's step: what a curriculum goes by.
        """
        ...


class TrainingSequences:
    """Every user's training events in windows of `window` inputs: one causal pass trains every position.

    `windows="last"` keeps a user's most recent window, as the published code does; `"all"` cuts the whole sequence
    into windows from the end, so that no event is left out. `spans` [n, 3] are other windows, whatever these say.
    """

    def __init__(
        self,
        split: Split,
        window: int,
        windows: str = "last",
        negatives: UniformNegatives | None = None,
        spans: np.ndarray | None = None,
    ) -> None:
        self.split, self.window, self.negatives = split, window, negatives
        if spans is None:
            found = [
                (user, max(0, end - window), end)
                for user, last in enumerate(split.train_end - 1)
                for end in (range(int(last), 0, -window) if windows == "all" else [int(last)])
                if end > 0
            ]
            spans = np.array(found, dtype=np.int64).reshape(-1, 3)
        # A span (user, start, end) trains the inputs start..end-1 to name the events start+1..end.
        self.spans = spans
        self.lengths = self.spans[:, 2] - self.spans[:, 1]

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> SequenceBatch:
        spans = self.spans[indices]
        lengths = self.lengths[indices]
        items = np.zeros((len(indices), padded_length(int(lengths.max()), self.window)), dtype=np.int64)
        targets = []
        for i, (user, start, end) in enumerate(spans):
            sequence = self.split.history(int(user), int(end) + 1)
            items[i, : end - start] = sequence[start:end]
            targets.append(sequence[start + 1 : end + 1])
        negatives = None
        if self.negatives is not None:
            negatives = torch.from_numpy(self.negatives.draw(spans[:, 0], indices, epoch))
        return SequenceBatch(
            torch.from_numpy(items),
            torch.from_numpy(lengths),
            torch.from_numpy(np.flatnonzero(items)),
            torch.from_numpy(np.concatenate(targets)),
            negatives,
            count=int(lengths.sum()),
        )


class EvaluationSequences:
    """The history before each target of a phase, cut to the last `window` events."""

    def __init__(self, split: Split, phase: Phase, window: int) -> None:
        self.split, self.window, self.cases = split, window, split.targets(phase)
        self.lengths = np.minimum(self.cases.position, window)

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> SequenceBatch:
        lengths = self.lengths[indices]
        longest = max(1, int(lengths.max()))
        items = np.zeros((len(indices), padded_length(longest, self.window)), dtype=np.int64)
        for i, (case, length) in enumerate(zip(indices, lengths, strict=True)):
            history = self.split.history(int(self.cases.user[case]), int(self.cases.position[case]))
            items[i, :length] = history[len(history) - length :]
        return SequenceBatch(
            torch.from_numpy(items),
            torch.from_numpy(lengths),
            row=torch.from_numpy(np.asarray(indices, dtype=np.int64)),
        )


class TrainingPrompts:
    """Rows of `data.tokenized.build_prompts` for training.

    Labels are the tokens of titles, or, with `label_items`, the items whose titles start behind a token. With
    `label_inputs` the tokens of the prompt are labels, too, as in the published BIGRec. `shared` tokens begin all rows.
    """

    def __init__(
        self,
        prompts: Dataset,
        split: Split,
        titles: TitleTokens,
        *,
        label_inputs: bool,
        label_items: bool,
        shared: int = 0,
    ) -> None:
        self.prompts, self.split, self.titles = prompts.with_format("numpy"), split, titles
        self.label_inputs, self.label_items, self.shared = label_inputs, label_items, shared
        self.lengths = prompts.data.column("length").to_numpy().astype(np.int64)

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> PromptBatch:
        rows = self.prompts[indices]
        input_ids, attention_mask = pad(rows["input_ids"], side="right")
        behind, targets = [], []
        for i, (ids, context) in enumerate(zip(rows["input_ids"], rows["context"], strict=True)):
            if self.label_items:
                items, at = self._titles_of(int(rows["user"][i]), int(rows["position"][i]), int(context), len(ids))
                targets.append(items.astype(np.int64))
            else:
                at = np.arange(1 if self.label_inputs else context, len(ids))
                targets.append(ids[at].astype(np.int64))
            behind.append(i * input_ids.shape[1] + at - 1)
        labelled = np.concatenate(behind)
        return PromptBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(attention_mask),
            torch.from_numpy(labelled),
            torch.from_numpy(np.concatenate(targets)),
            shared=self.shared,
            count=len(labelled),
        )

    def _titles_of(self, user: int, position: int, context: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the items that a row names behind its context, and the token where the title of each starts."""
        items = self.split.training_items(user)[position:]
        starts = context + np.cumsum(self.titles.lengths[items]) - self.titles.lengths[items]
        return items[starts < length], starts[starts < length]


class EvaluationPrompts:
    """Rows of `data.tokenized.build_prompts` for a phase: prompts padded on the left, so that text can follow."""

    def __init__(self, prompts: Dataset, histories: Examples | None = None) -> None:
        self.prompts, self.histories = prompts.with_format("numpy"), histories
        self.lengths = prompts.data.column("length").to_numpy().astype(np.int64)

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> PromptBatch:
        rows = self.prompts[indices]
        input_ids, attention_mask = map(torch.from_numpy, pad(rows["input_ids"], side="left"))
        row = rows["row"].astype(np.int64)
        history = None if self.histories is None else self.histories.collate(row, 0)
        assert history is None or isinstance(history, SequenceBatch)
        return PromptBatch(input_ids, attention_mask, row=torch.from_numpy(row), history=history)


def pad(sequences: Sequence[np.ndarray], side: Literal["left", "right"]) -> tuple[np.ndarray, np.ndarray]:
    """Return [B, L] int64 token ids, padded with 0, and their attention mask."""
    ids = np.zeros((len(sequences), padded_length(max(map(len, sequences)))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(ids.shape[1] - len(sequence), None)
        ids[i, place], mask[i, place] = sequence, 1
    return ids, mask


def on_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Return a batch that is a dataclass with its tensors, and those of its history, on `device`."""
    moved: dict[str, Any] = {n: to_device(v, device) for n, v in vars(batch).items() if isinstance(v, Tensor)}
    moved |= {n: v.to(device) for n, v in vars(batch).items() if isinstance(v, SequenceBatch)}
    return replace(cast(Any, batch), **moved)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`; only from pinned memory does a copy to a GPU not hold the host up."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
