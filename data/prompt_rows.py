"""Which titles stand in which prompt: the settings, and the rows that follow from them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .prompts import template_by_name
from .splits import Phase, Split
from .title_tokens import ends_of


@dataclass(frozen=True)
class PromptSettings:
    """How histories become rows. Raises ValueError when the settings contradict each other."""

    template: str = "bigrec-movie"
    """Text of the prompt: bigrec-movie, bigrec-game, bigrec-notes or dense."""
    mode: Literal["response", "dense"] = "response"
    """response: one row a training position, whose title is the label. dense: one row a window of a user's
    titles, each of which is a label for the ones before it, so that one pass trains them all."""
    history_length: int = 10
    """Titles in a prompt, at most (response mode, and evaluation in both modes)."""
    window: int = 20
    """dense: titles in a row, at most."""
    overlap: int = 5
    """dense: titles of the row before that a row repeats as context, without labels."""
    max_length: int = 512
    """Tokens in a row, at most; the oldest titles are dropped to fit."""
    few_shot: int | None = None
    """response: draw this many training rows (the BIGRec paper: 1024); all when unset or not that many."""
    seed: int = 0
    """Seed of the few-shot draw."""
    min_history: int = 1
    """response: train on positions with at least this many events before them (BIGRec's movie data: 10)."""

    def __post_init__(self) -> None:
        template_by_name(self.template)
        if self.mode not in ("response", "dense"):
            raise ValueError(f"--method.prompts.mode {self.mode!r}: expected response or dense.")
        for name in ("history_length", "min_history", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--method.prompts.{name} {getattr(self, name)}: expected at least 1.")
        if not 1 <= self.overlap < self.window:
            raise ValueError(f"--method.prompts.overlap {self.overlap}: expected 1 to --method.prompts.window - 1.")
        if self.few_shot is not None and (self.few_shot < 1 or self.mode == "dense"):
            raise ValueError(f"--method.prompts.few_shot {self.few_shot}: expected at least 1, and mode response.")

    def no_room(self, user: int, position: int) -> ValueError:
        """The error for a title that does not fit even without a history."""
        return ValueError(
            f"The prompt and the title of event {position} of user {user} are longer than "
            f"--method.prompts.max_length {self.max_length} even without a history: raise it, or choose a "
            "shorter --method.prompts.template."
        )


class Rows(NamedTuple):
    """A row reads its user's events start..position-1 and answers position..stop-1 (none in evaluation)."""

    user: np.ndarray  # [R] int64
    start: np.ndarray  # [R] int64
    position: np.ndarray  # [R] int64
    stop: np.ndarray  # [R] int64

    @property
    def total(self) -> int:
        """R."""
        return len(self.user)

    def take(self, index: np.ndarray | slice) -> "Rows":
        return Rows(*(column[index] for column in self))


class ResponseRows:
    """One row for every training position that has enough history, or a seeded draw of them.

    They are made when they are taken: all at once would need more memory than the events.
    """

    def __init__(self, split: Split, settings: PromptSettings) -> None:
        self._ends = ends_of(np.maximum(split.train_end - settings.min_history, 0))  # of each user's rows
        self._settings = settings
        self.total = int(self._ends[-1])
        self._drawn: np.ndarray | None = None
        if settings.few_shot is not None and settings.few_shot < self.total:
            drawn = np.random.default_rng(settings.seed).choice(self.total, settings.few_shot, replace=False)
            self._drawn, self.total = np.sort(drawn), settings.few_shot

    def take(self, index: slice) -> Rows:
        rows = np.arange(*index.indices(self.total)) if self._drawn is None else self._drawn[index]
        user = np.searchsorted(self._ends, rows, side="right") - 1
        position = rows - self._ends[user] + self._settings.min_history
        return Rows(user, np.maximum(position - self._settings.history_length, 0), position, position + 1)


def response_rows(split: Split, settings: PromptSettings) -> Rows:
    """Return all of `ResponseRows`."""
    return ResponseRows(split, settings).take(slice(None))


def evaluation_rows(split: Split, settings: PromptSettings, phase: Phase) -> Rows:
    targets = split.targets(phase)
    start = np.maximum(targets.position - settings.history_length, 0)
    return Rows(targets.user, start, targets.position, targets.position)


def dense_rows(split: Split, settings: PromptSettings, title_lengths: np.ndarray, room: int) -> tuple[Rows, int]:
    """Windows of at most `room` tokens; every training title but a user's first is a label exactly once.

    Returns the rows and how many of them hold less context than `overlap` asks for, to fit.
    """
    windows: list[tuple[int, int, int, int]] = []
    shortened = 0
    for user in range(split.num_users):
        ends = ends_of(title_lengths[split.training_items(user)])  # tokens before each title
        length, position = len(ends) - 1, 1
        while position < length:
            wanted = max(position - settings.overlap, 0)
            start = max(wanted, int(np.searchsorted(ends, ends[position + 1] - room)))
            if start > position:
                raise settings.no_room(user, position)
            fitting = int(np.searchsorted(ends, ends[start] + room, side="right")) - 1
            stop = max(position + 1, min(start + settings.window, fitting))
            windows.append((user, start, position, stop))
            shortened += start > wanted
            position = stop
    return Rows(*np.array(windows, dtype=np.int64).reshape(-1, 4).T), shortened
