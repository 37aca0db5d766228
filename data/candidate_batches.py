"""Batches of candidate prompts: the target among items that the user has not met, in an order that tells nothing."""

from typing import Literal

import numpy as np
import torch

from .batches import PromptBatch, SequenceBatch, padded_length, sequences_of
from .candidate_rows import HYBRID, TEXT, CandidateSettings, UnseenCandidates, shuffled
from .candidate_tokens import SLOT_TOKEN, CandidateEncoder, CandidateRows, Shown
from .draws import Draws
from .prompt_rows import Rows, evaluation_rows, response_rows
from .splits import Phase, Split
from .title_tokens import ends_of, ranges


class CandidatePrompts:
    """Rows of a split as candidate prompts; what training and evaluation share."""

    def __init__(self, split: Split, encoder: CandidateEncoder, settings: CandidateSettings, seed: int) -> None:
        self.split, self.encoder, self.settings, self.seed = split, encoder, settings, seed
        self.num_texts = len(encoder.texts.texts)

    def show(
        self, rows: Rows, candidates: np.ndarray, draws: Draws, hybrid: np.ndarray | None, answer: np.ndarray | None
    ) -> tuple[CandidateRows, SequenceBatch]:
        """The tokens of rows with these candidates, and the history items that they show.

        Where `hybrid` [R] is False a text prompt takes the place of a hybrid one. Raises ValueError when a row does
        not fit even without a history.
        """
        everywhere = np.ones(len(candidates), dtype=bool)
        titles = everywhere & (self.settings.mode != "id")
        vectors = everywhere & (self.settings.mode != "text") if hybrid is None else hybrid
        text = draws.integers(TEXT, 1, self.num_texts)[:, 0]
        start = rows.start.copy()
        while True:
            counts = rows.position - start
            history = self.split.items[ranges(self.split.offsets[rows.user] + start, counts)]
            encoded = self.encoder.encode(Shown(history, counts, candidates, text, titles, vectors, answer))
            long = np.flatnonzero(encoded.tokens.lengths > self.settings.max_length)
            if not len(long):
                return encoded, sequences_of(history, counts)
            stuck = long[start[long] == rows.position[long]]
            if len(stuck):
                raise ValueError(
                    f"A prompt with {candidates.shape[1]} candidates has {encoded.tokens.lengths[stuck[0]]} tokens "
                    f"even without a history, more than --method.prompts.max_length {self.settings.max_length}: "
                    "raise it, or offer fewer candidates."
                )
            start[long] += 1


class TrainingCandidates(CandidatePrompts):
    """One prompt for each training event with enough history, answered by its title.

    Each epoch draws text, candidates and their order anew, as a function of (seed, epoch, example).
    """

    def __init__(self, split: Split, encoder: CandidateEncoder, settings: CandidateSettings, seed: int) -> None:
        super().__init__(split, encoder, settings, seed)
        self.rows = response_rows(split, settings.history())
        self.unseen = UnseenCandidates(split, self.rows, settings.num_candidates)
        self.targets = self.unseen.targets
        self.lengths = self._expected_lengths()

    def _expected_lengths(self) -> np.ndarray:
        """Tokens of each example, [n], with candidates of mean length: those of an epoch are not known before it."""
        encoder, rows = self.encoder, self.rows
        ends = ends_of(encoder.item_lengths[self.split.items])
        offset = self.split.offsets[rows.user]
        history = ends[offset + rows.position] - ends[offset + rows.start]
        count = self.settings.num_candidates
        candidates = count * int(encoder.item_lengths[1:].mean())
        expected = encoder.fixed_length(count) + history + candidates + encoder.responses.lengths[self.targets]
        return np.minimum(expected, self.settings.max_length)

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> PromptBatch:
        draws, answer = Draws.of(self.seed, epoch, indices), self.targets[indices]
        candidates = self.unseen.draw(indices, draws)
        hybrid = None
        if self.settings.curriculum != "none":
            hybrid = draws.fractions(HYBRID, 1)[:, 0] < self.settings.hybrid_share(progress)
        encoded, history = self.show(self.rows.take(indices), candidates, draws, hybrid, answer)
        input_ids, mask, slots = _padded(encoded, side="right")
        position = np.arange(input_ids.shape[1])
        answered = (position >= encoded.context[:, None] - 1) & (position < encoded.tokens.lengths[:, None] - 1)
        labelled = np.flatnonzero(answered)
        return PromptBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(mask),
            torch.from_numpy(labelled),
            torch.from_numpy(input_ids.ravel()[labelled + 1]),
            item_slots=torch.from_numpy(slots),
            slot_items=torch.from_numpy(encoded.slot_items),
            candidates=torch.from_numpy(candidates),
            history=history,
            count=len(labelled),
        )


class EvaluationCandidates(CandidatePrompts):
    """One prompt for each target of a phase, with its frozen candidates: [n, C], the target first.

    Text and order of a prompt are a function of the seed and the row. Candidates of unlike number need their own
    examples, not their own encoder.
    """

    def __init__(
        self,
        split: Split,
        phase: Phase,
        encoder: CandidateEncoder,
        settings: CandidateSettings,
        seed: int,
        candidates: np.ndarray,
    ) -> None:
        super().__init__(split, encoder, settings, seed)
        self.rows = evaluation_rows(split, settings.history(), phase)
        everything = np.arange(len(self.rows.user))
        self.candidates = shuffled(candidates, Draws.of(seed, 0, everything))
        parts = np.split(everything, range(1024, len(everything), 1024))
        self.lengths = np.concatenate([self._encoded(part)[0].tokens.lengths for part in parts])

    def _encoded(self, indices: np.ndarray) -> tuple[CandidateRows, SequenceBatch]:
        draws = Draws.of(self.seed, 0, indices)
        return self.show(self.rows.take(indices), self.candidates[indices], draws, None, None)

    def collate(self, indices: np.ndarray, epoch: int = 0, progress: float = 0.0) -> PromptBatch:
        encoded, history = self._encoded(indices)
        input_ids, mask, slots = _padded(encoded, side="left")
        return PromptBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(mask),
            item_slots=torch.from_numpy(slots),
            slot_items=torch.from_numpy(encoded.slot_items),
            candidates=torch.from_numpy(self.candidates[indices]),
            row=torch.from_numpy(np.asarray(indices, dtype=np.int64)),
            history=history,
        )


def _padded(rows: CandidateRows, side: Literal["left", "right"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and attention mask, [B, L] int64, and where the slots are in the flattened ids, [S]."""
    lengths = rows.tokens.lengths
    width = padded_length(int(lengths.max()))
    first = width - lengths if side == "left" else np.zeros_like(lengths)
    position = np.arange(width)
    real = (position >= first[:, None]) & (position < (first + lengths)[:, None])
    input_ids = np.full(real.shape, SLOT_TOKEN, dtype=np.int64)
    input_ids[real] = rows.tokens.ids
    return input_ids, real.astype(np.int64), rows.slot_row * width + first[rows.slot_row] + rows.slot_offset
