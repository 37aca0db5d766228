"""Leave-one-out splits against those of RecBole's and LlamaRec's own code, with the tie rule pinned."""

import hashlib

import numpy as np
import pytest

from data.config import DataConfig
from data.sources import read
from data.splits import Split, split


@pytest.fixture
def expected_and_splits(golden, data_root):
    """Pairs of what the golden file says of a split, and the split made here."""
    meta, tensors = golden("splits")
    pairs = []
    for key, expected in meta["splits"].items():
        if not (data_root / expected["dataset"]).is_dir():
            pytest.skip(f"{expected['dataset']} is not in {data_root}")
        core = expected["k_core"]
        config = DataConfig(
            source=expected["dataset"],
            root=data_root,
            user_core=core,
            item_core=core,
            min_rating=expected["min_rating"],
        )
        interactions = read(config)
        raw_items = np.array(interactions.catalog.raw_ids[1:], dtype=np.int64)
        of_all_users = {name: tensors[f"{key}.{name}"].numpy() for name in ("user", "valid", "test", "n_train")}
        pairs.append((expected, of_all_users, split(interactions, config), np.append(0, raw_items)))
    return pairs


def canonical_text(made: Split, raw_items: np.ndarray) -> bytes:
    lines = []
    for user, raw_user in enumerate(made.raw_users):
        train = ",".join(str(item) for item in raw_items[made.training_items(user)])
        valid, test = (raw_items[made.target_items(phase)[user]] for phase in ("valid", "test"))
        lines.append(f"{raw_user}\t{train}\t{valid}\t{test}\n")
    return "".join(lines).encode()


def test_every_sequence_is_the_published_one(expected_and_splits):
    for expected, of_all_users, made, raw_items in expected_and_splits:
        text = canonical_text(made, raw_items)
        assert (made.num_users, made.num_items) == (expected["users"], expected["items"])
        assert len(made.items) == expected["interactions"]
        assert made.train_end.sum() == expected["train_interactions"]
        assert len(text) == expected["canonical_bytes"]
        assert hashlib.sha256(text).hexdigest() == expected["sha256"]
        assert made.hash == expected["sha256_test_only"]
        assert [int(raw) for raw in made.raw_users] == of_all_users["user"].tolist()
        assert made.train_end.tolist() == of_all_users["n_train"].tolist()
        for phase in ("valid", "test"):
            assert raw_items[made.target_items(phase)].tolist() == of_all_users[phase].tolist()


def test_first_users_event_by_event(expected_and_splits):
    for expected, _, made, raw_items in expected_and_splits:
        for row, user in enumerate(expected["first_users"]):
            assert made.raw_users[row] == str(user["user"])
            position = made.test.position[row]
            assert raw_items[made.history(row, position)].tolist() == [*user["train"], user["valid"]]
            assert raw_items[made.target_items("test")[row]] == user["test"]


@pytest.mark.parametrize("masked", [True, False])
def test_popularity_of_the_training_part(expected_and_splits, masked):
    for expected, _, made, _ in expected_and_splits:
        counts = made.item_counts()
        ranks = []
        for user, target in zip(made.test.user, made.target_items("test"), strict=True):
            counts_of_user = counts.copy()
            counts_of_user[0] = -1
            if masked:
                counts_of_user[made.history(user, made.test.position[user])] = -1
            before = counts_of_user > counts_of_user[target]
            before[:target] |= counts_of_user[:target] == counts_of_user[target]  # ties by smaller raw id
            ranks.append(before.sum())
        rank = np.array(ranks)
        hit = rank < 10
        published = expected["popularity_train_counts"]["masked" if masked else "unmasked"]
        assert hit.mean() == pytest.approx(published["HR@10"], abs=1e-12)
        assert (hit / np.log2(rank + 2)).mean() == pytest.approx(published["NDCG@10"], abs=1e-12)


def test_movielens_1m_has_the_published_sizes(data_root):
    """6,040 / 3,416 / 999,611: the sequences behind the published SASRec figures."""
    if not (data_root / "ml-1m").is_dir():
        pytest.skip(f"ml-1m is not in {data_root}")
    interactions = read(DataConfig(source="ml-1m", root=data_root, item_core=5))
    sizes = len(interactions.raw_users), interactions.catalog.num_items, len(interactions.item)
    assert sizes == (6040, 3416, 999_611)
