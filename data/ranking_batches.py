"""Batches of ranking prompts: the target among negatives to learn from, and the retriever's candidates to rank."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from .batches import NO_LABEL, on_device, padded_length
from .candidate_rows import UnseenCandidates, shuffled
from .candidate_store import CandidateStore, cut_rows
from .draws import Draws
from .prompt_rows import Rows, evaluation_rows, response_rows
from .ranking_prompts import RankingSettings
from .ranking_tokens import SLOT_TOKEN, RankingEncoder, RankingRows
from .splits import Phase, Split
from .title_tokens import ranges

CUT = 0  # the number of an example's `Draws` that says where its history ends
ROWS_AT_ONCE = 1024  # of which lengths are computed together


@dataclass(frozen=True)
class RankingBatch:
    """B users with K candidates each, in R = B * P prompts that show them in P orders (training: P = 1).

    Training pads on the right, and so does an evaluation of prompts without candidates; any other pads on the left.
    Slots are indices into `input_ids.flatten()`.
    """

    input_ids: Tensor  # [R, L] int64
    attention_mask: Tensor  # [R, L] int64
    ends: Tensor  # [R] int64: slots of the prompts' last tokens, behind which an identifier follows
    candidates: Tensor  # [B, K] int64, the retriever's best first
    order: Tensor  # [R, K] int64: the place in `candidates` of what each identifier names
    retriever_scores: Tensor | None = None  # [B, K] float32
    index_slots: Tensor | None = None  # [R * K] int64: where vectors of identifiers stand
    answers: Tensor | None = None  # [R] int64, training only: the identifier of the target, NO_LABEL for none
    row: Tensor | None = None  # [B] int64, evaluation only: index into split.targets(phase)
    count: int = 0

    def to(self, device: torch.device) -> "RankingBatch":
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> "RankingBatch":
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        assert self.answers is not None
        return replace(self, answers=torch.full_like(self.answers, NO_LABEL), count=0)


class RankingPrompts:
    """What training and evaluation share: prompts of rows of a split, cut to fit.

    Raises ValueError where candidates may not fit even without a history.
    """

    def __init__(
        self, split: Split, encoder: RankingEncoder, settings: RankingSettings, seed: int, answered: bool = False
    ) -> None:
        self.split, self.encoder, self.settings, self.seed = split, encoder, settings, seed
        self.room = settings.max_length - answered
        needed = encoder.longest_without_history(settings.num_candidates)
        if settings.truncation == "history" and needed > self.room:
            raise ValueError(
                f"{settings.num_candidates} candidates with the longest titles take {needed} tokens even without a "
                f"history, more than --method.prompts.max_length {settings.max_length}: raise it, or lower "
                "--method.prompts.num_candidates or --method.prompts.title_tokens"
            )

    def encode(self, rows: Rows, candidates: np.ndarray) -> RankingRows:
        """The prompts of rows with these candidates, [R, K]; see `fit`."""
        if self.settings.truncation == "left":
            encoded = self.encoder.encode(*self._history(rows), candidates)
            return RankingRows(self.encoder.cut_left(encoded.tokens, self.room), None)
        return self.encoder.encode(*self._history(self.fit(rows, candidates)), candidates)

    def fit(self, rows: Rows, candidates: np.ndarray) -> Rows:
        """The rows without the oldest history items that do not fit; without any, every row does."""
        start, long = rows.start.copy(), np.arange(len(rows.user))
        while len(long):
            now = rows._replace(start=start).take(long)
            lengths = self.encoder.parts(*self._history(now), candidates[long]).row_lengths()
            long = long[lengths > self.room]
            start[long] += 1
        return rows._replace(start=start)

    def _history(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        counts = rows.position - rows.start
        return self.split.items[ranges(self.split.offsets[rows.user] + rows.start, counts)], counts


class TrainingRankings(RankingPrompts):
    """Prompts whose target is known, each among candidates in an order that tells nothing.

    Every training event with enough history is an example, or with `cuts` so many random ones of each user in each
    epoch. Negatives are drawn among unseen items, or are the best of the `hard` candidates of the event. All of it is a
    function of (seed, epoch, example). `answer_ids` [K] put the answer's token behind each prompt, and make the loss
    count two labels: that token and the end.
    """

    def __init__(
        self,
        split: Split,
        encoder: RankingEncoder,
        settings: RankingSettings,
        seed: int,
        *,
        cuts: int | None = None,
        hard: CandidateStore | None = None,
        answer_ids: np.ndarray | None = None,
    ) -> None:
        super().__init__(split, encoder, settings, seed, answered=answer_ids is not None)
        self.cuts, self.hard, self.answer_ids = cuts, hard, answer_ids
        self.rows = response_rows(split, settings.history())
        self.unseen = UnseenCandidates(split, self.rows, settings.num_candidates)
        self.targets = self.unseen.targets
        self.users, self.first, self.counts = np.unique(self.rows.user, return_index=True, return_counts=True)
        self.lengths = self._expected_lengths()

    def _expected_lengths(self) -> np.ndarray:
        """Tokens of each example, [n], by titles of mean length: those of an epoch are not known before it."""
        settings, table = self.settings, self.encoder.table
        title = int(table.lengths[self.encoder.first_title + 1 :].mean()) + 3  # an index is three tokens or so
        shown = self.rows.position - self.rows.start
        if self.cuts is not None:
            shown = np.repeat(np.add.reduceat(shown, self.first) // self.counts, self.cuts)
        offered = 0 if self.encoder.identifiers is None else settings.num_candidates
        return np.minimum(table.lengths[0] + (shown + offered) * title, settings.max_length)

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> RankingBatch:
        draws = Draws.of(self.seed, epoch, indices)
        events = indices
        if self.cuts is not None:
            user = indices // self.cuts
            events = self.first[user] + (draws.fractions(CUT, 1)[:, 0] * self.counts[user]).astype(np.int64)
        rows, targets = self.rows.take(events), self.targets[events]
        candidates = self._candidates(events, rows, targets, draws)
        answers = (candidates == targets[:, None]).argmax(axis=1)
        encoded = self.encode(rows, candidates)
        padded = Padded.of(encoded, "right", None if self.answer_ids is None else self.answer_ids[answers])
        return RankingBatch(
            *padded[:3],
            candidates=torch.from_numpy(candidates),
            order=torch.arange(candidates.shape[1]).expand(len(indices), -1),
            index_slots=padded.index_slots,
            answers=torch.from_numpy(answers),
            count=len(indices) * (1 if self.answer_ids is None else 2),
        )

    def _candidates(self, events: np.ndarray, rows: Rows, targets: np.ndarray, draws: Draws) -> np.ndarray:
        """The target and its negatives in random order, [B, K]."""
        if self.hard is None:
            return self.unseen.draw(events, draws)
        found = self.hard.items[cut_rows(self.split, rows.user, rows.position)].astype(np.int64)
        others = np.argsort(found == targets[:, None], axis=1, kind="stable")[:, : self.settings.num_candidates - 1]
        return shuffled(np.column_stack([targets, np.take_along_axis(found, others, axis=1)]), draws)


class EvaluationRankings(RankingPrompts):
    """The candidates of each target of a phase, first in their own order, then in `permutations` - 1 random ones."""

    def __init__(
        self,
        split: Split,
        phase: Phase,
        encoder: RankingEncoder,
        settings: RankingSettings,
        seed: int,
        store: CandidateStore,
        *,
        permutations: int = 1,
        scored: bool = True,
    ) -> None:
        """`scored`: the store's scores are a retriever's, and go into the batch."""
        super().__init__(split, encoder, settings, seed)
        self.rows = evaluation_rows(split, settings.history(), phase)
        self.store, self.permutations, self.scored = store, permutations, scored
        everything = np.arange(len(self.rows.user))
        parts = np.split(everything, range(ROWS_AT_ONCE, len(everything), ROWS_AT_ONCE))
        self.lengths = np.concatenate([self._lengths(part) for part in parts])

    def _lengths(self, indices: np.ndarray) -> np.ndarray:
        candidates = self.store.items[indices].astype(np.int64)
        return self.encode(self.rows.take(indices), candidates).tokens.lengths

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> RankingBatch:
        candidates = self.store.items[indices].astype(np.int64)
        order_BPK = self._orders(indices, candidates.shape[1])
        shown = np.take_along_axis(candidates[:, None], order_BPK, axis=2).reshape(-1, candidates.shape[1])
        encoded = self.encode(self.rows.take(np.repeat(indices, self.permutations)), shown)
        # Encoders count places from the left; behind candidates that a decoder reads, all prompts end together.
        padded = Padded.of(encoded, "right" if self.encoder.identifiers is None else "left")
        return RankingBatch(
            *padded[:3],
            candidates=torch.from_numpy(candidates),
            order=torch.from_numpy(order_BPK.reshape(shown.shape)),
            index_slots=padded.index_slots,
            retriever_scores=torch.from_numpy(self.store.scores[indices]) if self.scored else None,
            row=torch.from_numpy(np.asarray(indices, dtype=np.int64)),
        )

    def _orders(self, indices: np.ndarray, count: int) -> np.ndarray:
        own = np.broadcast_to(np.arange(count), (len(indices), count))
        drawn = [shuffled(own, Draws.of(self.seed, number, indices)) for number in range(1, self.permutations)]
        return np.stack([own, *drawn], axis=1)


class Padded(NamedTuple):
    """Rows of one length; slots are indices into the flattened ids."""

    ids: Tensor  # [R, L] int64
    mask: Tensor  # [R, L] int64
    ends: Tensor  # [R] int64: slots of the prompts' last tokens
    index_slots: Tensor | None  # [R * K] int64

    @classmethod
    def of(cls, rows: RankingRows, side: Literal["left", "right"], answer: np.ndarray | None = None) -> Self:
        """Pad on a side; `answer` [R] are tokens that follow the prompts."""
        lengths = rows.tokens.lengths
        total = lengths + (answer is not None)
        width, row = padded_length(int(total.max())), np.arange(len(lengths))
        first = width - total if side == "left" else np.zeros_like(lengths)
        place = np.arange(width) - first[:, None]
        ids = np.full(place.shape, SLOT_TOKEN, dtype=np.int64)
        ids[(place >= 0) & (place < lengths[:, None])] = rows.tokens.ids
        ends = row * width + first + lengths - 1
        if answer is not None:
            ids.reshape(-1)[ends + 1] = answer
        slots = None
        if rows.slots is not None:
            slots = torch.from_numpy(((row * width + first)[:, None] + rows.slots).reshape(-1))
        mask = ((place >= 0) & (place < total[:, None])).astype(np.int64)
        return cls(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(ends), slots)
