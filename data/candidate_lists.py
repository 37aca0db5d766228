"""Lists of candidates to be ranked at once: histories and candidates as item ids, and what was written as vectors."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import NO_LABEL, SequenceBatch, on_device, sequences_of
from .candidate_rows import UnseenCandidates
from .candidate_store import CandidateStore, cut_rows
from .descriptions import Descriptions
from .draws import Draws
from .prompt_rows import Rows
from .splits import Phase, Split
from .texts import TextBatch
from .title_tokens import TokenTable, ranges

CUT = 0  # the number of an example's `Draws` that says where its history ends
COUNT_FLAG = "--method.num_candidates"


@dataclass(frozen=True)
class CandidateBatch:
    """B histories with C candidates each, in an order that a ranker may read."""

    history: SequenceBatch  # the newest events before each target
    candidates: Tensor  # [B, C] int64
    texts: Tensor | None = None  # [B, 1 + L, T] float16: the user's text, then those of the history's items
    answers: Tensor | None = None  # [B] int64, training only: the place of the target, NO_LABEL for none
    row: Tensor | None = None  # [B] int64, evaluation only: index into split.targets(phase)
    count: int = 0
    tokens: TextBatch | None = None  # M distinct texts, instead of vectors where the encoder learns
    places: Tensor | None = None  # [B, 1 + L] int64: the rows of `tokens`; 0 is no text

    def to(self, device: torch.device) -> "CandidateBatch":
        """Return the same batch on `device`."""
        moved = on_device(self, device)
        return moved if self.tokens is None else replace(moved, tokens=self.tokens.to(device))

    def muted(self) -> "CandidateBatch":
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        assert self.answers is not None
        return replace(self, answers=torch.full_like(self.answers, NO_LABEL), count=0)


@dataclass(frozen=True)
class TextVectors:
    """What an encoder makes of the descriptions of a split; rows of nothing are zero."""

    descriptions: Descriptions
    items: np.ndarray  # [N + 1, T] float16
    users: np.ndarray  # [R + 1, T] float16

    def of(self, history_BL: Tensor, user: np.ndarray, cut: np.ndarray) -> dict[str, Any]:
        """Of a batch: the newest text of each user from before the cut, and those of the history's items."""
        users = self.users[self.descriptions.user_rows(user, cut)]
        return {"texts": torch.from_numpy(np.concatenate([users[:, None], self.items[history_BL.numpy()]], axis=1))}


@dataclass(frozen=True)
class TextTokens:
    """The descriptions of a split as tokens, for an encoder that learns."""

    descriptions: Descriptions
    distinct: TokenTable  # row 0 is the empty text
    items: np.ndarray  # [N + 1] int64: rows of `distinct`
    users: np.ndarray  # [R + 1] int64

    def of(self, history_BL: Tensor, user: np.ndarray, cut: np.ndarray) -> dict[str, Any]:
        """Of a batch: as `TextVectors.of`, each distinct text once."""
        users = self.users[self.descriptions.user_rows(user, cut)]
        rows = np.concatenate([users[:, None], self.items[history_BL.numpy()]], axis=1)
        read, places = np.unique(np.append(0, rows), return_inverse=True)
        tokens = TextBatch.of([self.distinct[row] for row in read])
        return {"tokens": tokens, "places": torch.from_numpy(places[1:].reshape(rows.shape))}


Texts = TextVectors | TextTokens


class CandidateLists:
    """Rows of a split; what training and evaluation share."""

    def __init__(self, split: Split, rows: Rows, texts: Texts | None) -> None:
        self.split, self.rows, self.texts = split, rows, texts
        self.lengths = rows.position - rows.start

    def batch(self, events: np.ndarray, candidates: np.ndarray) -> CandidateBatch:
        """Rows with these candidates, [B, C]."""
        rows = self.rows.take(events)
        counts = rows.position - rows.start
        history = sequences_of(self.split.items[ranges(self.split.offsets[rows.user] + rows.start, counts)], counts)
        texts = {} if self.texts is None else self.texts.of(history.items, rows.user, rows.position)
        return CandidateBatch(history, torch.from_numpy(candidates.astype(np.int64)), **texts)


class TrainingLists(CandidateLists):
    """Lists that hold the target of their row.

    Candidates are the target and random items that the user had not met by then, in random order, or with `found` the
    list of a retriever in its order, of the rows whose target it holds. With `cuts` an epoch has so many random rows
    of each user. All of it is a function of (seed, epoch, example).
    """

    def __init__(
        self,
        split: Split,
        rows: Rows,
        num_candidates: int,
        seed: int,
        texts: Texts | None,
        *,
        cuts: int | None = None,
        found: CandidateStore | None = None,
    ) -> None:
        targets, self.found = split.items[split.offsets[rows.user] + rows.position], np.empty((0, num_candidates))
        if found is not None:
            stored = found.items[cut_rows(split, rows.user, rows.position)].astype(np.int64)
            holds = (stored == targets[:, None]).any(axis=1)
            rows, targets, self.found = rows.take(np.flatnonzero(holds)), targets[holds], stored[holds]
            if not len(targets):
                raise ValueError(f"no list of --method.retriever holds its target: raise {COUNT_FLAG}")
        super().__init__(split, rows, texts)
        self.seed, self.cuts, self.targets = seed, cuts, targets
        self.unseen = None if found is not None else UnseenCandidates(split, rows, num_candidates, COUNT_FLAG)
        self.first, self.counts = np.unique(rows.user, return_index=True, return_counts=True)[1:]
        if cuts is not None:
            self.lengths = np.repeat(np.maximum.reduceat(self.lengths, self.first), cuts)

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> CandidateBatch:
        draws, events = Draws.of(self.seed, epoch, indices), indices
        if self.cuts is not None:
            user = indices // self.cuts
            events = self.first[user] + (draws.fractions(CUT, 1)[:, 0] * self.counts[user]).astype(np.int64)
        candidates = self.found[events] if self.unseen is None else self.unseen.draw(events, draws)
        answers = (candidates == self.targets[events][:, None]).argmax(axis=1)
        return replace(self.batch(events, candidates), answers=torch.from_numpy(answers), count=len(events))


class EvaluationLists(CandidateLists):
    """The candidates [n, C] of each target of a phase, in their order."""

    def __init__(
        self,
        split: Split,
        phase: Phase,
        history_length: int,
        candidates: np.ndarray,
        texts: Texts | None,
    ) -> None:
        targets = split.targets(phase)
        start = np.maximum(targets.position - history_length, 0)
        super().__init__(split, Rows(targets.user, start, targets.position, targets.position), texts)
        self.candidates = candidates

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> CandidateBatch:
        row = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return replace(self.batch(indices, self.candidates[indices]), row=row)
