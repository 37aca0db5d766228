import hashlib
import logging

import numpy as np
import pytest

from data.config import DataConfig
from data.interactions import Catalog, Interactions, Role
from data.splits import split


def interactions_of(sequences: list[list[tuple[int, int]]], presplit=None) -> Interactions:
    """One list of (item, timestamp) a user; users are called a, b, c, ... and item i is called i * 10."""
    events = [(user, item, time) for user, sequence in enumerate(sequences) for item, time in sequence]
    user, item, timestamp = np.array(events, dtype=np.int64).T
    raw_ids = ("", *(str(10 * i) for i in range(1, item.max() + 1)))
    return Interactions(
        name="toy",
        user=user,
        item=item,
        timestamp=timestamp,
        rating=np.ones(len(user), dtype=np.float32),
        catalog=Catalog(raw_ids, ((),) * len(raw_ids), raw_ids, has_titles=False),
        raw_users=tuple("abcdefghijklmnopqrstuvwxyz"[: len(sequences)]),
        presplit=presplit,
    )


def test_leave_one_out(caplog):
    sequences = [[(1, 0), (2, 1), (3, 2), (4, 3)], [(5, 0), (1, 1)], [(2, 0), (1, 0), (2, 0)]]
    with caplog.at_level(logging.WARNING, "shardrec"):
        made = split(interactions_of(sequences), DataConfig())
    assert made.kind == "leave-one-out"
    assert "1 of 3 users have fewer than 3 events" in caplog.text
    assert made.train_end.tolist() == [2, 2, 1]  # the short one keeps all its events
    assert made.test.user.tolist() == made.valid.user.tolist() == [0, 2]
    assert made.target_items("valid").tolist() == [3, 1]
    assert made.target_items("test").tolist() == [4, 2]
    assert made.history(0, made.test.position[0]).tolist() == [1, 2, 3]
    assert made.training_items(1).tolist() == [5, 1]
    assert made.item_counts().tolist() == [0, 2, 2, 0, 0, 1]
    assert made.hash == hashlib.sha256(b"a\t40\nc\t20\n").hexdigest()


def test_nobody_to_evaluate():
    with pytest.raises(ValueError, match="no validation targets"):
        split(interactions_of([[(1, 0), (2, 1)]]), DataConfig())


def test_global_time(caplog):
    # Of 20 times 14 are before 16, where validation starts, and 16 before 18, where test starts.
    sequences = [
        [(1, 0), (2, 1), (3, 16), (4, 17), (5, 18), (6, 19)],
        [(1, time) for time in range(2, 13)],
        [(7, 14), (8, 18)],
        [(9, 19)],
    ]
    config = DataConfig(split="global-time", valid_quantile=0.7, test_quantile=0.8)
    with caplog.at_level(logging.WARNING, "shardrec"):
        made = split(interactions_of(sequences), config)
    assert made.kind == "global-time"
    assert made.train_end.tolist() == [2, 11, 1, 0]
    assert made.valid.user.tolist() == [0]
    assert made.target_items("valid").tolist() == [3]  # the first event of the period only
    assert made.test.user.tolist() == [0, 2]  # user d has no history
    assert made.target_items("test").tolist() == [5, 8]
    assert made.history(0, made.test.position[0]).tolist() == [1, 2, 3, 4]
    assert "1 of 3 test users have no earlier event" in caplog.text


def test_global_time_never_trains_on_later_events():
    random = np.random.default_rng(0)
    sequences = [[(1 + i, int(t)) for i, t in enumerate(np.sort(random.integers(0, 99, 9)))] for _ in range(20)]
    interactions = interactions_of(sequences)
    made = split(interactions, DataConfig(split="global-time"))
    position = np.arange(len(interactions.item)) - made.offsets[interactions.user]
    in_training = position < made.train_end[interactions.user]
    valid_times = interactions.timestamp[made.offsets[made.valid.user] + made.valid.position]
    test_times = interactions.timestamp[made.offsets[made.test.user] + made.test.position]
    assert interactions.timestamp[in_training].max() < valid_times.min()
    assert valid_times.max() < test_times.min()


@pytest.mark.parametrize("quantiles", [(0.9, 0.8), (0.0, 0.5), (0.8, 1.0)])
def test_quantiles_out_of_order(quantiles):
    config = DataConfig(split="global-time", valid_quantile=quantiles[0], test_quantile=quantiles[1])
    with pytest.raises(ValueError, match=r"--data\.valid_quantile"):
        split(interactions_of([[(1, 0), (2, 1), (3, 2)]]), config)


def test_one_moment_cannot_be_cut():
    with pytest.raises(ValueError, match="both start at time 5"):
        split(interactions_of([[(1, 5), (2, 5), (3, 5)]]), DataConfig(split="global-time"))


def test_presplit_roles():
    sequences = [[(1, 0), (2, 1)], [(3, 0), (1, 1)], [(2, 0), (4, 1)]]
    roles = np.array([Role.TRAIN, Role.TRAIN, Role.CONTEXT, Role.VALID, Role.CONTEXT, Role.TEST], dtype=np.int8)
    made = split(interactions_of(sequences, roles), DataConfig())
    assert made.kind == "presplit"
    assert made.train_end.tolist() == [2, 0, 0]
    assert made.item_counts().tolist() == [0, 1, 1, 0, 0]
    assert (made.valid.user.tolist(), made.target_items("valid").tolist()) == ([1], [1])
    assert (made.test.user.tolist(), made.target_items("test").tolist()) == ([2], [4])
    assert made.hash == hashlib.sha256(b"c\t40\n").hexdigest()
