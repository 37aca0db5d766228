"""New items: only the test names them, everything else stays as it was."""

from dataclasses import replace

import numpy as np
import pytest

from data.cold_items import with_cold_items
from data.config import DataConfig
from data.sources import read
from data.splits import Split, split


@pytest.fixture(scope="module")
def whole():
    config = DataConfig(source="sample")
    interactions = read(config)
    return interactions.catalog, split(interactions, config)


def events(parts: Split) -> list[list[int]]:
    return [parts.items[parts.offsets[u] : parts.offsets[u + 1]].tolist() for u in range(parts.num_users)]


def test_only_test_targets_name_a_cold_item(whole) -> None:
    catalog, before = whole
    after = with_cold_items(before, catalog, 0.1, seed=0)
    asked = np.unique(before.target_items("test"))
    assert len(after.cold_items) == round(0.1 * len(asked))
    assert np.isin(after.cold_items, asked).all()
    assert after.item_counts()[after.cold_items].sum() == 0
    assert before.item_counts()[after.cold_items].sum() > 0
    assert not np.isin(after.target_items("valid"), after.cold_items).any()
    assert np.isin(after.target_items("test"), after.cold_items).any()
    for case in range(len(after.test)):
        history = after.history(int(after.test.user[case]), int(after.test.position[case]))
        assert len(history)
        assert not np.isin(history, after.cold_items).any()


def test_the_rest_stays(whole) -> None:
    """Training, validation and test are what they were, without the cold items; nothing moves between the parts."""
    catalog, before = whole
    after = with_cold_items(before, catalog, 0.1, seed=0)
    cold = set(after.cold_items.tolist())
    for user in range(before.num_users):
        expected = [item for item in before.training_items(user).tolist() if item not in cold]
        assert after.training_items(user).tolist() == expected
    for phase in ("valid", "test"):
        old = dict(zip(before.targets(phase).user.tolist(), before.target_items(phase).tolist(), strict=True))
        new = dict(zip(after.targets(phase).user.tolist(), after.target_items(phase).tolist(), strict=True))
        if phase == "valid":
            old = {user: item for user, item in old.items() if item not in cold}
        assert new == old
        assert (np.diff(after.targets(phase).user) > 0).all()


def test_a_target_without_history_is_not_asked(whole) -> None:
    catalog, before = whole
    cold = set(with_cold_items(before, catalog, 0.1, seed=0).cold_items.tolist())
    items = before.items.copy()
    user = next(u for u, item in enumerate(before.target_items("test")) if item not in cold)
    start, position = before.offsets[user], before.test.position[user]
    items[start : start + position] = min(cold)
    after = with_cold_items(replace(before, items=items), catalog, 0.1, seed=0)
    assert user not in after.test.user
    assert len(after.test) == len(before.test) - 1


def test_share_and_seed_decide_the_hash(whole) -> None:
    catalog, before = whole
    hashes = {with_cold_items(before, catalog, share, seed).hash for share, seed in ((0.1, 0), (0.1, 1), (0.2, 0))}
    assert len(hashes | {before.hash}) == 4
    assert with_cold_items(before, catalog, 0.1, 0).hash in hashes


@pytest.mark.parametrize("share", [1e-6, 1.0, 1.5])
def test_a_share_that_leaves_one_side_empty_is_refused(whole, share: float) -> None:
    with pytest.raises(ValueError, match=r"--data\.cold_items"):
        with_cold_items(whole[1], whole[0], share, seed=0)
