"""What UR4Rec V2 reads: histories as item ids, and the sentences of what was written of each user by then."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from .batches import SequenceBatch, on_device, sequences_of
from .descriptions import Descriptions
from .negatives import UniformNegatives
from .splits import Phase, Split
from .texts import TextBatch
from .title_tokens import TokenTable

NO_USER = -1  # instead of the number of a user that training does not have
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class PreferenceBatch:
    """R rows, each a user at a cut: everything here is of events before it, but for the target."""

    history: SequenceBatch  # R rows: the newest events before each cut
    users: Tensor  # [R] int64, NO_USER for those that training does not have
    cuts: Tensor  # [R] int64: how many events of the user come before
    sentences: Tensor  # [R, P] int64: those of the user's text, as rows of `vectors` or `tokens`; 0 is none
    vectors: Tensor | None = None  # [M, T] float16: distinct sentences; row 0 is zero
    tokens: TextBatch | None = None  # M rows, instead of vectors where the encoder learns
    targets: Tensor | None = None  # [R] int64, training only; 0 is no label
    taken: Tensor | None = None  # [2, S] int64, training only: row and item of all that the users took in training
    negatives: Tensor | None = None  # [R, K] int64: items that the user did not take
    writes: Tensor | None = None  # [R] bool, training only: the row of each user that the memory is written by
    progress: float = 0.0  # epochs trained before the batch's step
    row: Tensor | None = None  # [R] int64, evaluation only: index into split.targets(phase)
    count: int = 0

    def to(self, device: torch.device) -> Self:
        """Return the same batch on `device`."""
        moved = on_device(self, device)
        return moved if self.tokens is None else replace(moved, tokens=self.tokens.to(device))

    def muted(self) -> Self:
        """Return the same batch without labels: it keeps a process in step and adds nothing to the loss."""
        assert self.targets is not None
        assert self.writes is not None
        none = {"targets": torch.zeros_like(self.targets), "writes": torch.zeros_like(self.writes)}
        return replace(self, **none, count=0)  # type: ignore[arg-type]


def split_sentences(text: str, most: int) -> list[str]:
    """Return the first sentences of a text."""
    return [part for part in _SENTENCE_END.split(text.strip())[:most] if part]


@dataclass(frozen=True)
class ProfileSentences:
    """The texts of a split's users as sentences, each distinct one once."""

    descriptions: Descriptions
    sentences: list[str]  # [M]; entry 0 is empty
    places: np.ndarray  # [texts, P] int64: the sentences of each text, 0 where it has fewer

    @classmethod
    def of(cls, descriptions: Descriptions, most: int) -> Self:
        known = {"": 0}
        places = np.zeros((len(descriptions.user_texts), most), np.int64)
        for row, text in enumerate(descriptions.user_texts):
            for place, sentence in enumerate(split_sentences(text, most)):
                places[row, place] = known.setdefault(sentence, len(known))
        return cls(descriptions, list(known), places)

    def newest(self, users: np.ndarray, cuts: np.ndarray) -> np.ndarray:
        """Return the sentences [n, P] of each user's newest text that reads only events before the cut."""
        return self.places[self.descriptions.user_rows(users, cuts)]


class PreferenceRows:
    """Puts rows together: any user of a split, at any cut."""

    def __init__(
        self, split: Split, profiles: ProfileSentences, encoded: Tensor | TokenTable, window: int, known_users: bool
    ) -> None:
        """`encoded` are the sentences' vectors [M, T] or tokens; `known_users`: the split is the one of training."""
        self.split, self.profiles, self.encoded = split, profiles, encoded
        self.window, self.known_users = window, known_users

    def batch(self, users: np.ndarray, cuts: np.ndarray) -> PreferenceBatch:
        histories = [self.split.history(int(u), int(c))[-self.window :] for u, c in zip(users, cuts, strict=True)]
        lengths = np.array([len(history) for history in histories], np.int64)
        sentences = self.profiles.newest(users, cuts)
        distinct, places = np.unique(np.append(0, sentences), return_inverse=True)
        vectors = tokens = None
        if isinstance(self.encoded, Tensor):
            vectors = self.encoded[torch.from_numpy(distinct)]
        else:
            tokens = TextBatch.of([self.encoded[i] for i in distinct])
        return PreferenceBatch(
            sequences_of(np.concatenate(histories), lengths),
            torch.from_numpy(users if self.known_users else np.full_like(users, NO_USER)),
            torch.from_numpy(cuts),
            torch.from_numpy(places[1:].reshape(sentences.shape)),
            vectors,
            tokens,
        )


class TrainingPreferences:
    """An example is a user, at a few cuts an epoch: a function of (seed, epoch, user), drawn without replacement.

    All cuts of a user stand in one batch, and one of them, drawn with them, writes the user's memory: so no step
    depends on how it is cut into micro-batches.
    """

    def __init__(self, rows: PreferenceRows, cuts: int, negatives: int, seed: int) -> None:
        self.rows, self.seed, self.cuts = rows, seed, cuts
        train_end = rows.split.train_end
        self.users = np.flatnonzero(train_end > 1)
        self.lengths = np.minimum(train_end[self.users] - 1, rows.window)
        self.per_user = np.minimum(cuts, train_end - 1)
        self.negatives = UniformNegatives(rows.split, negatives, seed) if negatives else None

    def draw(self, user: int, epoch: int) -> tuple[np.ndarray, int]:
        """Return a user's cuts, ascending, and which of them writes."""
        random = np.random.default_rng((self.seed, epoch, user))
        last, count = int(self.rows.split.train_end[user]), int(self.per_user[user])
        return np.sort(1 + random.choice(last - 1, count, replace=False)), int(random.integers(count))

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> PreferenceBatch:
        split, users = self.rows.split, self.users[indices]
        drawn = [self.draw(int(user), epoch) for user in users]
        cuts = np.concatenate([positions for positions, _ in drawn])
        counts = self.per_user[users]
        rows = np.repeat(users, counts)
        targets = split.items[split.offsets[rows] + cuts]
        negatives = None
        if self.negatives is not None:
            found = self.negatives.draw_each(users, users, counts * self.negatives.count, epoch)
            negatives = torch.from_numpy(found.reshape(len(rows), -1))
        everything = [split.training_items(int(user)) for user in rows]
        taken = np.stack([np.repeat(np.arange(len(rows)), list(map(len, everything))), np.concatenate(everything)])
        writes = np.concatenate([np.arange(len(positions)) == writer for positions, writer in drawn])
        return replace(
            self.rows.batch(rows, cuts),
            targets=torch.from_numpy(targets),
            taken=torch.from_numpy(taken),
            negatives=negatives,
            writes=torch.from_numpy(writes),
            progress=progress,
            count=len(rows),
        )


class EvaluationPreferences:
    """Each target of a phase: its user at its place."""

    def __init__(self, rows: PreferenceRows, phase: Phase) -> None:
        self.rows, self.cases = rows, rows.split.targets(phase)
        self.lengths = np.minimum(self.cases.position, rows.window)

    def collate(self, indices: Sequence[int] | np.ndarray, epoch: int = 0, progress: float = 0.0) -> PreferenceBatch:
        indices = np.asarray(indices, dtype=np.int64)
        batch = self.rows.batch(self.cases.user[indices], self.cases.position[indices])
        return replace(batch, progress=progress, row=torch.from_numpy(indices))
