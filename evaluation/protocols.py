"""Who competes with the target: candidate sets and the mask of seen items.

"full" ranks the whole catalogue. "sampled-100" and "candidates-20" rank the target among 100 or 19 uniform
negatives that the user has not seen, drawn once from the seed. Sampled figures do not compare with full ones;
they may even reverse the order of two models (Krichene and Rendle, KDD 2020). So their metrics are named
"sampled-100/HR@10".
"""

import hashlib
from typing import Literal

import numpy as np

from data.splits import Phase, Split

Mask = Literal["none", "train", "full-history"]
Protocol = Literal["full", "sampled-100", "candidates-20"]

NUM_NEGATIVES: dict[str, int] = {"sampled-100": 100, "candidates-20": 19}


def metric_prefix(protocol: Protocol) -> str:
    """What stands before a protocol's metric names: "sampled-100/" for "sampled-100", nothing for "full"."""
    return "" if protocol == "full" else f"{protocol}/"


def seen_pairs(split: Split, phase: Phase, mask: Mask, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What to leave out for `rows` [B] of `split.targets(phase)`: pairs (index in `rows`, item), both [S].

    "full-history" leaves out every event before the target; "train" only those of the training part, as some
    papers' code does (the validation item then competes with the test target); "none" leaves out nothing.
    """
    targets = split.targets(phase)
    user, position = targets.user[rows], targets.position[rows]
    if mask == "full-history":
        num_seen = position
    elif mask == "train":
        num_seen = np.minimum(split.train_end[user], position)
    else:
        num_seen = np.zeros_like(position)
    seen_rows = np.repeat(np.arange(len(rows)), num_seen)
    ends = np.cumsum(num_seen)
    index_in_history = np.arange(len(seen_rows)) - np.repeat(ends - num_seen, num_seen)
    return seen_rows, split.items[split.offsets[user][seen_rows] + index_in_history]


class NotEnoughItems(ValueError):
    """A user has met so much of the catalogue that a candidate set cannot be filled."""


def draw_candidates(split: Split, phase: Phase, protocol: Protocol, seed: int) -> np.ndarray | None:
    """The frozen candidates of every target, [n, 1 + negatives] int64 with the target first; None for "full".

    Negatives are uniform without replacement over the items that are neither the target nor in its history.
    Raises NotEnoughItems when a user has too few unseen items for the protocol.
    """
    if protocol == "full":
        return None
    num_negatives = NUM_NEGATIVES[protocol]
    targets = split.target_items(phase)
    rows = np.arange(len(targets))
    seen_rows, seen_items = seen_pairs(split, phase, "full-history", rows)
    stride = split.num_items + 1
    taken = np.sort(np.concatenate([seen_rows * stride + seen_items, rows * stride + targets]))
    taken = taken[np.diff(taken, prepend=-1) > 0]
    num_unseen = split.num_items - np.bincount(taken // stride, minlength=len(rows))
    if num_unseen.size and num_unseen.min() < num_negatives:
        user = split.raw_users[split.targets(phase).user[int(num_unseen.argmin())]]
        raise NotEnoughItems(
            f"user {user} has {num_unseen.min()} unseen items, --protocol {protocol} draws {num_negatives}; "
            "use the protocol full (--evaluation.protocol full)"
        )
    return np.concatenate([targets[:, None], _draw_negatives(len(rows), num_negatives, taken, stride, seed)], axis=1)


def _draw_negatives(num_rows: int, num_negatives: int, taken: np.ndarray, stride: int, seed: int) -> np.ndarray:
    """Distinct items a row, [num_rows, num_negatives], none in `taken` (sorted keys: row * stride + item)."""
    generator = np.random.default_rng(seed)
    negatives = generator.integers(1, stride, size=(num_rows, num_negatives))
    unfinished = np.arange(num_rows)
    while unfinished.size:
        drawn = negatives[unfinished]
        keys = unfinished[:, None] * stride + drawn
        nearest = np.minimum(np.searchsorted(taken, keys), len(taken) - 1)
        rejected = (taken[nearest] == keys) | _repeats(drawn)
        drawn[rejected] = generator.integers(1, stride, size=int(rejected.sum()))
        negatives[unfinished] = drawn
        unfinished = unfinished[rejected.any(axis=1)]
    return negatives


def _repeats(items: np.ndarray) -> np.ndarray:
    """Where an item already stands further left in its row: bool, the shape of `items` [n, C]."""
    order = np.argsort(items, axis=1, kind="stable")
    in_order = np.take_along_axis(items, order, axis=1)
    repeated_in_order = np.zeros(items.shape, dtype=bool)
    repeated_in_order[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    repeated = np.empty_like(repeated_in_order)
    np.put_along_axis(repeated, order, repeated_in_order, axis=1)
    return repeated


def candidates_hash(candidates: np.ndarray | None) -> str | None:
    """sha256 of a candidate set, for the result's header; None for the whole catalogue."""
    if candidates is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(candidates, dtype="<i8").tobytes()).hexdigest()
