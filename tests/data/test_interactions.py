from collections.abc import Sequence

import numpy as np
import pytest

from data.config import DataConfig
from data.interactions import ItemText, RawEvents, build_interactions, encode_ids


def raw_events(rows: Sequence[tuple[str, str, float, int]], **optional) -> RawEvents:
    """Rows of (user, item, rating, timestamp) in file order."""
    users, items, ratings, timestamps = zip(*rows, strict=True)
    return RawEvents(
        user=encode_ids(users),
        item=encode_ids(items),
        rating=np.array(ratings, dtype=np.float32),
        timestamp=np.array(timestamps, dtype=np.int64),
        texts=optional.get("texts", {}),
        presplit=optional.get("presplit"),
    )


def raw_pairs(interactions) -> list[tuple[str, str]]:
    raw_items = interactions.catalog.raw_ids
    pairs = zip(interactions.user, interactions.item, strict=True)
    return [(interactions.raw_users[user], raw_items[item]) for user, item in pairs]


def test_sorts_by_user_and_time_and_keeps_the_file_order_of_ties():
    rows = [("2", "b", 1, 5), ("1", "z", 1, 9), ("1", "c", 1, 9), ("1", "a", 1, 3), ("1", "b", 1, 9)]
    built = build_interactions("toy", raw_events(rows), DataConfig())
    assert raw_pairs(built) == [("1", "a"), ("1", "z"), ("1", "c"), ("1", "b"), ("2", "b")]
    assert built.timestamp.tolist() == [3, 9, 9, 9, 5]


@pytest.mark.parametrize(
    ("raw_ids", "ascending"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),  # all integers: as numbers
        (["10", "9", "x"], ("10", "9", "x")),  # else as strings
        (["7", "007", "10"], ("007", "10", "7")),  # "007" and "7" are two ids, so these are no numbers
    ],
)
def test_numbers_ids_in_ascending_order(raw_ids, ascending):
    built = build_interactions("toy", raw_events([(raw_id, raw_id, 1, 0) for raw_id in raw_ids]), DataConfig())
    assert built.raw_users == ascending
    assert built.catalog.raw_ids == ("", *ascending)
    assert raw_pairs(built) == [(raw_id, raw_id) for raw_id in ascending]


def test_min_rating_keeps_the_bound_itself_and_shrinks_the_catalogue():
    rows = [("1", "1", 3.5, 0), ("1", "2", 4.0, 1), ("2", "3", 4.5, 0), ("3", "1", 1.0, 0)]
    built = build_interactions("toy", raw_events(rows), DataConfig(min_rating=4))
    assert raw_pairs(built) == [("1", "2"), ("2", "3")]
    assert built.catalog.raw_ids == ("", "2", "3")
    assert built.raw_users == ("1", "2")
    assert built.item.tolist() == [1, 2]


@pytest.mark.parametrize(("duplicates", "timestamps"), [("keep", [1, 2, 3, 3]), ("first", [1, 2]), ("last", [2, 3])])
def test_duplicates_are_first_or_last_in_time_not_in_the_file(duplicates, timestamps):
    rows = [("1", "a", 5, 3), ("1", "a", 4, 1), ("1", "b", 3, 2), ("1", "a", 2, 3)]
    built = build_interactions("toy", raw_events(rows), DataConfig(duplicates=duplicates))
    assert built.timestamp.tolist() == timestamps
    if duplicates == "last":
        assert built.rating.tolist() == [3, 2]  # of two events at time 3 the later row


def test_core_is_repeated_until_nothing_changes():
    # Item c goes (1 event), then user 3 (1 event left), then item d, which only user 3 kept at two.
    rows = [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b"), ("2", "d"), ("3", "c"), ("3", "d")]
    events = raw_events([(user, item, 1, time) for time, (user, item) in enumerate(rows)])
    built = build_interactions("toy", events, DataConfig(user_core=2, item_core=2))
    assert raw_pairs(built) == [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")]
    only_items = build_interactions("toy", events, DataConfig(item_core=2))
    assert ("3", "d") in raw_pairs(only_items)


def test_rating_filter_comes_before_duplicates_and_core():
    rows = [("1", "a", 1, 0), ("1", "a", 5, 1), ("1", "b", 5, 2), ("2", "a", 5, 0), ("2", "b", 1, 1)]
    config = DataConfig(min_rating=4, duplicates="first", user_core=2)
    built = build_interactions("toy", raw_events(rows), config)
    assert raw_pairs(built) == [("1", "a"), ("1", "b")]
    assert built.timestamp.tolist() == [1, 2]


@pytest.mark.parametrize("config", [DataConfig(min_rating=9), DataConfig(user_core=9), DataConfig(item_core=9)])
def test_nothing_left_names_the_filter(config):
    flag = next(name for name in ("min_rating", "user_core", "item_core") if getattr(config, name))
    with pytest.raises(ValueError, match=rf"no events are left after --data\.{flag} 9"):
        build_interactions("toy", raw_events([("1", "a", 1, 0)]), config)


def test_catalogue_falls_back_to_raw_ids():
    events = raw_events([("1", "a", 1, 0), ("1", "b", 1, 1)], texts={"a": ItemText("Heat (1995)", ("Crime",))})
    catalog = build_interactions("toy", events, DataConfig()).catalog
    assert catalog.titles == ("", "Heat (1995)", "b")
    assert catalog.categories == ((), ("Crime",), ())
    assert catalog.has_titles
    assert not build_interactions("toy", events._replace(texts={}), DataConfig()).catalog.has_titles


@pytest.mark.parametrize("changed", [{"min_rating": 2}, {"user_core": 2}, {"duplicates": "first"}])
def test_a_source_that_comes_split_is_not_filtered(changed):
    events = raw_events([("1", "a", 1, 0)], presplit=np.zeros(1, dtype=np.int8))
    with pytest.raises(ValueError, match=f"already split.*--data.{next(iter(changed))}"):
        build_interactions("toy", events, DataConfig(**changed))


def test_the_text_hash_knows_titles_and_categories_and_nothing_of_events():
    def text_hash(rows, title, categories):
        texts = {"1": ItemText(title, categories), "2": ItemText("Heat", ())}
        return build_interactions("toy", raw_events(rows, texts=texts), DataConfig()).catalog.text_hash

    rows = [("1", "1", 1, 0), ("1", "2", 1, 1)]
    reference = text_hash(rows, "Babe (1995)", ("Comedy",))
    assert text_hash([*rows, ("2", "1", 5, 9)], "Babe (1995)", ("Comedy",)) == reference
    assert text_hash(rows, "Babe", ("Comedy",)) != reference
    assert text_hash(rows, "Babe (1995)", ("Comedy", "Drama")) != reference
