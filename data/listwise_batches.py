"""Batches for listwise ranking: prompts with the wanted order of their candidates, and lists that are to be ranked."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .batches import SequenceBatch, on_device, padded_length, sequences_of
from .candidate_rows import shuffled
from .candidate_store import CandidateStore, cut_rows
from .draws import Draws
from .listwise_prompts import ListwiseEncoder
from .prompt_rows import Rows, evaluation_rows, response_rows
from .splits import Phase, Split
from .teacher_labels import TeacherLabels
from .title_tokens import ranges


@dataclass(frozen=True)
class RankedBatch:
    """Ranking prompts for training, padded on the right: each goes on to the "[" of its answer, or to its end.

    Slots are indices into `input_ids.flatten()`.
    """

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64
    opened: Tensor  # [B] int64: slots of the answers' "[", whose logits name the first candidate
    ranks: Tensor  # [B, C] int64: the wanted rank of each candidate as listed, 1 for the best
    labelled: Tensor  # [T] int64: slots whose next token is one of the answer, as many in each row
    targets: Tensor  # [T] int64: those tokens
    count: int  # prompts
    row: None = None

    def to(self, device: torch.device) -> "RankedBatch":
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> "RankedBatch":
        """Return the same batch without wanted ranks: it keeps a process in step and adds nothing to the loss."""
        nothing = torch.zeros_like(self.ranks)
        return replace(self, ranks=nothing, labelled=self.labelled[:0], targets=self.targets[:0], count=0)


@dataclass(frozen=True)
class ListBatch:
    """Candidates that a model is to put in order, with the histories that tell how."""

    history: SequenceBatch
    candidates: Tensor  # [B, K] int64, the retriever's best first
    row: Tensor  # [B] int64: index into split.targets(phase)
    count: int = 0

    def to(self, device: torch.device) -> "ListBatch":
        """Return the same batch on `device`."""
        return on_device(self, device)

    def muted(self) -> "ListBatch":
        """Return the same batch: it has no labels."""
        return self


class TrainingLists:
    """One prompt for each training event: it and what the retriever named, listed in random order.

    The wanted order is the next item, then the others as the retriever has them; with `labels` it is a teacher's, for
    the events that it has judged. Each epoch draws the order of the list anew. `writes` adds the whole answer.
    """

    def __init__(
        self,
        split: Split,
        encoder: ListwiseEncoder,
        store: CandidateStore | None,
        labels: TeacherLabels | None,
        num_candidates: int,
        seed: int,
        *,
        writes: bool,
    ) -> None:
        self.split, self.encoder, self.seed, self.writes = split, encoder, seed, writes
        rows = response_rows(split, encoder.settings.history())
        if labels is not None:
            judged = labels.among(rows.user, rows.position)
            self.rows, self.candidates = rows.take(judged.row), judged.candidates
            if (judged_candidates := self.candidates.shape[1]) > num_candidates:
                raise ValueError(
                    f"--method.labels judges lists of {judged_candidates} candidates, and a prompt shows "
                    f"{num_candidates}: pass --method.window {judged_candidates}, and as many --method.num_candidates"
                )
        else:
            assert store is not None
            self.rows = rows
            targets = split.items[split.offsets[rows.user] + rows.position]
            found = store.items[cut_rows(split, rows.user, rows.position)].astype(np.int64)
            self.candidates = target_first(targets, found, num_candidates)
        self.lengths = prompt_lengths(split, self.rows, encoder, self.candidates)
        if writes:
            self.lengths += len(encoder.answer(range(self.candidates.shape[1])))

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> RankedBatch:
        wanted_BC = self.candidates[indices]
        places_BC = np.tile(np.arange(wanted_BC.shape[1]), (len(indices), 1))
        listed_BC = shuffled(places_BC, Draws.of(self.seed, epoch, indices))  # the wanted place of each, as listed
        rows = self.rows.take(indices)
        prompts, answers = [], []
        for i, listed in enumerate(listed_BC):
            answer = self.encoder.answer(np.argsort(listed).tolist()) if self.writes else [*self.encoder.open]
            history = self.split.history(int(rows.user[i]), int(rows.position[i]))[rows.start[i] :]
            prompts.append(self.encoder.prompt(history, wanted_BC[i][listed], len(answer)))
            answers.append(answer)
        context = np.array(list(map(len, prompts)))
        length = context + np.array(list(map(len, answers)))
        place = np.arange(padded_length(int(length.max())))
        real, answered = place < length[:, None], (place >= context[:, None]) & (place < length[:, None])
        input_ids = np.zeros(real.shape, dtype=np.int64)
        input_ids[real] = [token for row in zip(prompts, answers, strict=True) for ids in row for token in ids]
        opened = np.arange(len(indices)) * len(place) + context + len(self.encoder.open) - 1
        return RankedBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(real.astype(np.int64)),
            torch.from_numpy(opened),
            torch.from_numpy(listed_BC + 1),
            torch.from_numpy(np.flatnonzero(answered) - 1),
            torch.from_numpy(input_ids[answered]),
            count=len(indices),
        )


class ListedHistories:
    """The histories of a phase, each with candidates [n, K]; the model writes the prompts itself.

    It must, since what a window holds depends on the windows before it.
    """

    def __init__(
        self, split: Split, phase: Phase, encoder: ListwiseEncoder, candidates: np.ndarray, window: int
    ) -> None:
        """`window` is the number of candidates that a prompt shows at most."""
        self.split, self.candidates = split, candidates.astype(np.int64)
        self.rows = evaluation_rows(split, encoder.settings.history(), phase)
        self.lengths = prompt_lengths(split, self.rows, encoder, self.candidates[:, -window:])

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> ListBatch:
        rows = self.rows.take(indices)
        counts = rows.position - rows.start
        items = self.split.items[ranges(self.split.offsets[rows.user] + rows.start, counts)]
        return ListBatch(
            sequences_of(items, counts),
            torch.from_numpy(self.candidates[indices]),
            torch.from_numpy(np.asarray(indices, dtype=np.int64)),
        )


def target_first(targets: np.ndarray, found: np.ndarray, num_candidates: int) -> np.ndarray:
    """Each row's target [n], then the best others of what was found [n, k]: [n, num_candidates].

    Raises ValueError where too few others were found.
    """
    others = (found != targets[:, None]) & (found > 0)
    if (fewest := int(others.sum(axis=1).min(initial=num_candidates))) < num_candidates - 1:
        raise ValueError(
            f"the retriever names only {fewest} other items for some training events, and a prompt needs "
            f"{num_candidates - 1}: lower --method.window"
        )
    first = np.argsort(~others, axis=1, kind="stable")[:, : num_candidates - 1]
    return np.column_stack([targets, np.take_along_axis(found, first, axis=1)])


def prompt_lengths(split: Split, rows: Rows, encoder: ListwiseEncoder, candidates: np.ndarray) -> np.ndarray:
    """Tokens of each row's prompt before anything is dropped, [n] int64: what loaders group by."""
    if not len(rows.user):
        return np.zeros(0, dtype=np.int64)
    fixed = len(encoder.prompt(np.zeros(0, dtype=np.int64), np.zeros(candidates.shape[1], dtype=np.int64)))
    ends = np.concatenate([[0], np.cumsum(encoder.listed.lengths[split.items])])
    start, stop = (split.offsets[rows.user] + place for place in (rows.start, rows.position))
    total = fixed + ends[stop] - ends[start] + encoder.lines.lengths[candidates].sum(axis=1)
    return np.minimum(total, encoder.settings.max_length)
