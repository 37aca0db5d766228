"""Descriptions: what a text may read, how old it is, and a file that forgets nothing and believes nothing old."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.description_prompts import Event, item_template, likes, user_prompt, user_template
from data.descriptions import (
    TEXTS,
    Descriptions,
    DescriptionSettings,
    Profiles,
    append,
    read_texts,
    subjects,
    write_manifest,
)
from data.sources import read
from data.splits import Split, split

SAMPLE = DataConfig(source="sample", sample_users=20, sample_series=8)
EVERY_4 = DescriptionSettings(profile_every=4, history_length=6)


@pytest.fixture(scope="module")
def data():
    interactions = read(SAMPLE)
    return interactions.catalog, split(interactions, SAMPLE)


def write(folder: Path, catalog, parts: Split, settings: DescriptionSettings = EVERY_4) -> None:
    write_manifest(folder, parts, "me", settings, {})
    append(folder, "me", [(subject, subject.template("movie")) for subject in subjects(parts, catalog, settings)])


def test_a_text_reads_the_newest_events_before_it_and_none_that_is_held_out(data) -> None:
    catalog, parts = data
    users = [subject for subject in subjects(parts, catalog, EVERY_4) if subject.kind == "user"]
    assert {subject.name for subject in users} == set(parts.raw_users)
    for subject in users:
        user = parts.raw_users.index(subject.name)
        read = parts.history(user, subject.as_of)[-6:]
        assert subject.as_of <= parts.train_end[user]
        assert [event.title for event in subject.events] == [catalog.titles[item] for item in read]
        first = parts.offsets[user] + subject.as_of - len(read)
        assert [event.rating for event in subject.events] == parts.ratings[first : first + len(read)].tolist()
        unread = {catalog.titles[item] for item in parts.items[parts.offsets[user] + subject.as_of :]} - {
            event.title for event in subject.events
        }
        for text in (subject.prompt("movie"), subject.template("movie")):
            assert not any(title in text for title in unread)


def test_profiles_are_written_every_so_many_events_and_at_the_end(data) -> None:
    _, parts = data
    short = replace(parts, train_end=np.array([0, 3, 4, 9, *parts.train_end[4:]]))
    user, as_of = Profiles.of(short, 4)
    assert as_of[user == 0].tolist() == []
    assert [as_of[user == u].tolist() for u in (1, 2, 3)] == [[3], [4], [4, 8, 9]]
    assert [Profiles.of(short, 0).as_of[Profiles.of(short, 0).user == u].tolist() for u in (0, 3)] == [[], [9]]


def test_every_cut_finds_the_newest_text_before_it(tmp_path: Path, data) -> None:
    catalog, parts = data
    write(tmp_path, *data)
    found = Descriptions.read(tmp_path, parts, catalog)
    assert len(found.item_texts) == catalog.num_items + 1
    assert found.item_texts[0] == found.user_texts[0] == ""
    assert found.item_texts[3] == item_template("movie", catalog.titles[3], catalog.categories[3])
    profiles = Profiles.of(parts, 4)
    pairs = [(user, cut) for user in range(parts.num_users) for cut in range(parts.train_end[user] + 3)]
    rows = found.user_rows(*np.array(pairs).T)
    for (user, cut), row in zip(pairs, rows, strict=True):
        usable = profiles.as_of[(profiles.user == user) & (profiles.as_of <= cut)]
        assert found.as_of[row] == max(usable, default=0)
        assert (row > 0) == bool(len(usable))
        if row:
            assert profiles.user[row - 1] == user


def test_a_torn_line_is_mended_and_a_foreign_one_refused(tmp_path: Path, data) -> None:
    catalog, parts = data
    everything = list(subjects(parts, catalog, EVERY_4))
    write_manifest(tmp_path, parts, "me", EVERY_4, {})
    append(tmp_path, "me", [(subject, "a text") for subject in everything[:5]])
    file = tmp_path / TEXTS
    file.write_bytes(file.read_bytes()[:-9])
    assert len(read_texts(tmp_path)) == 4
    with pytest.raises(ValueError, match=f"lacks {len(everything) - 4} of {len(everything)} descriptions"):
        Descriptions.read(tmp_path, parts, catalog)
    append(tmp_path, "me", [(subject, "a text") for subject in everything[4:]])
    assert len(read_texts(tmp_path)) == len({subject.key("me") for subject in everything})
    assert Descriptions.read(tmp_path, parts, catalog).user_texts[1] == "a text"
    file.write_text('{"key": 1}\n' + file.read_text())
    with pytest.raises(ValueError, match="line 1: not a description"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="holds no descriptions"):
        Descriptions.read(tmp_path / "elsewhere", parts, catalog)


def test_a_text_is_missed_once_its_history_or_its_writer_is_another(data) -> None:
    catalog, parts = data
    keys = [subject.key("me") for subject in subjects(parts, catalog, EVERY_4)]
    changed = parts.items.copy()
    changed[parts.offsets[3] + 1] = 1 + changed[parts.offsets[3] + 1] % parts.num_items
    others = [subject.key("me") for subject in subjects(replace(parts, items=changed), catalog, EVERY_4)]
    about = [subject.name for subject in subjects(parts, catalog, EVERY_4) if subject.kind == "user"]
    different = [i - catalog.num_items for i in range(len(keys)) if keys[i] != others[i]]
    assert {about[i] for i in different} == {parts.raw_users[3]}
    assert not set(keys) & {subject.key("you") for subject in subjects(parts, catalog, EVERY_4)}


def test_likes_stand_against_dislikes_only_where_ratings_differ() -> None:
    def events(*ratings: float | None) -> list[Event]:
        return [Event(f"Film {i} (199{i})", (("Drama", "War")[i % 2],), rating) for i, rating in enumerate(ratings)]

    liked, disliked = likes(events(5, 1, 4))
    assert [event.title for event in liked] == ["Film 0 (1990)", "Film 2 (1992)"]
    assert [event.title for event in disliked] == ["Film 1 (1991)"]
    for alike in (events(3, 3, 3), events(None, 2, 3)):
        assert likes(alike) == (alike, [])
        assert "dislike" not in user_prompt("movie", alike)
    text = user_template("movie", events(5, 1, 4))
    assert "Likes Drama. Dislikes War." in text
    assert "Favourites: Film 0 (1990); Film 2 (1992)." in text
    assert "From the 1990s." in text
    assert "Drama (67 %), War (33 %)" in text
    assert item_template("item", "Chair", ()) == "Chair, an item."
