"""Cut every user's sequence into training, validation and test, and hash the result."""

import hashlib
import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .config import DataConfig
from .interactions import Interactions, Role

logger = logging.getLogger("shardrec")

Phase = Literal["valid", "test"]
Kind = Literal["leave-one-out", "global-time", "presplit"]


@dataclass(frozen=True)
class Targets:
    """The events that a phase asks for, at most one a user, users ascending."""

    user: np.ndarray  # [n] int64
    position: np.ndarray  # [n] int64: index in the user's sequence; the history is everything before it

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Split:
    """Every user's sequence, oldest event first, with its training part and the targets of both phases.

    Two results compare only if their `hash` is equal: sha256 over one line "raw user<TAB>raw test item<LF>"
    a test target, users ascending. With cold items (data/cold_items.py) it is a hash of that and of their raw ids.
    """

    name: str  # of the dataset
    kind: Kind
    offsets: np.ndarray  # [U + 1] int64; user u's sequence is items[offsets[u] : offsets[u + 1]]
    items: np.ndarray  # [E] int64, 1..N
    train_end: np.ndarray  # [U] int64; the first train_end[u] events of user u are for training
    valid: Targets
    test: Targets
    num_items: int
    hash: str
    raw_users: tuple[str, ...]  # [U]
    cold_items: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # that only test targets name
    ratings: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # [E] of each event; empty: unknown

    @property
    def num_users(self) -> int:
        return len(self.raw_users)

    def targets(self, phase: Phase) -> Targets:
        return self.valid if phase == "valid" else self.test

    def target_items(self, phase: Phase) -> np.ndarray:
        """[n] int64: the item that each target of the phase asks for."""
        targets = self.targets(phase)
        return self.items[self.offsets[targets.user] + targets.position]

    def history(self, user: int, position: int) -> np.ndarray:
        """[position] int64: every item of the user before `position`, oldest first."""
        start = self.offsets[user]
        return self.items[start : start + position]

    def training_items(self, user: int) -> np.ndarray:
        """[train_end[user]] int64: the user's items that training may see, oldest first."""
        return self.history(user, int(self.train_end[user]))

    def item_counts(self) -> np.ndarray:
        """[N + 1] int64: training events of each item; entry 0, padding, is 0."""
        lengths = np.diff(self.offsets)
        position = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], lengths)
        in_training = position < np.repeat(self.train_end, lengths)
        return np.bincount(self.items[in_training], minlength=self.num_items + 1)


def split(interactions: Interactions, config: DataConfig) -> Split:
    """Split as `config.split` says; a source that comes already split (`presplit`) keeps its own split.

    Raises ValueError when a phase has no targets or the time boundaries do not make three periods.
    """
    lengths = np.bincount(interactions.user, minlength=len(interactions.raw_users))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    kind: Kind = config.split if interactions.presplit is None else "presplit"
    if interactions.presplit is not None:
        train_end, valid, test = _presplit(interactions.presplit, offsets)
    elif config.split == "leave-one-out":
        train_end, valid, test = _leave_one_out(lengths)
    else:
        train_end, valid, test = _global_time(interactions, offsets, config)

    for phase, targets in (("validation", valid), ("test", test)):
        if not len(targets):
            raise ValueError(
                f"{interactions.name}: the {kind} split has no {phase} targets; "
                "relax --data.user_core and --data.min_rating, or choose another --data.split."
            )
    return Split(
        name=interactions.name,
        kind=kind,
        offsets=offsets,
        items=interactions.item,
        train_end=train_end,
        valid=valid,
        test=test,
        num_items=interactions.catalog.num_items,
        hash=_hash(interactions, offsets, test),
        raw_users=interactions.raw_users,
        ratings=interactions.rating,
    )


_Parts = tuple[np.ndarray, Targets, Targets]  # train_end [U], validation targets, test targets


def _leave_one_out(lengths: np.ndarray) -> _Parts:
    """Test is the last event, validation the one before; sequences shorter than 3 are for training only."""
    user = np.flatnonzero(lengths >= 3)
    if len(user) < len(lengths):
        logger.warning(
            "%d of %d users have fewer than 3 events: trained on, not evaluated.",
            len(lengths) - len(user),
            len(lengths),
        )
    train_end = np.where(lengths >= 3, lengths - 2, lengths)
    return train_end, Targets(user, lengths[user] - 2), Targets(user, lengths[user] - 1)


def _global_time(interactions: Interactions, offsets: np.ndarray, config: DataConfig) -> _Parts:
    """Training is all before one moment; in each later period a user's target is the first event in it."""
    quantiles = [config.valid_quantile, config.test_quantile]
    if not 0 < quantiles[0] < quantiles[1] < 1:
        raise ValueError(
            f"--data.valid_quantile {quantiles[0]} and --data.test_quantile {quantiles[1]}: "
            "expected 0 < valid < test < 1."
        )
    valid_from, test_from = np.quantile(interactions.timestamp, quantiles, method="higher")
    if valid_from == test_from:
        raise ValueError(
            f"{interactions.name}: validation and test would both start at time {valid_from}; "
            "move --data.valid_quantile and --data.test_quantile apart, or use --data.split leave-one-out."
        )
    before_valid = _events_before(interactions, offsets, valid_from)
    before_test = _events_before(interactions, offsets, test_from)
    valid_user = np.flatnonzero(before_valid < before_test)
    test_user = np.flatnonzero(before_test < np.diff(offsets))
    return (
        before_valid,
        _with_history(Targets(valid_user, before_valid[valid_user]), "validation"),
        _with_history(Targets(test_user, before_test[test_user]), "test"),
    )


def _events_before(interactions: Interactions, offsets: np.ndarray, moment: int) -> np.ndarray:
    """[U]: how many events each user has before the moment."""
    return np.bincount(interactions.user[interactions.timestamp < moment], minlength=len(offsets) - 1)


def _with_history(targets: Targets, phase: str) -> Targets:
    """Drop targets without any earlier event: there is nothing to predict them from."""
    warm = targets.position > 0
    if not warm.all():
        logger.warning("%d of %d %s users have no earlier event: not evaluated.", (~warm).sum(), len(warm), phase)
    return Targets(targets.user[warm], targets.position[warm])


def _presplit(role: np.ndarray, offsets: np.ndarray) -> _Parts:
    """Roles [E] as the source gives them: training events come first in a user's sequence, targets last."""
    user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    position = np.arange(len(role)) - offsets[user]
    train_end = np.bincount(user[role == Role.TRAIN], minlength=len(offsets) - 1)
    valid, test = (Targets(user[role == phase], position[role == phase]) for phase in (Role.VALID, Role.TEST))
    return train_end, valid, test


def _hash(interactions: Interactions, offsets: np.ndarray, test: Targets) -> str:
    raw_ids = interactions.catalog.raw_ids
    digest = hashlib.sha256()
    for user, item in zip(test.user, interactions.item[offsets[test.user] + test.position], strict=True):
        digest.update(f"{interactions.raw_users[user]}\t{raw_ids[item]}\n".encode())
    return digest.hexdigest()
