"""Recommendations: typed titles are found or refused, users of the data set are known, seen items stay out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.interactions import Catalog
from launch import recommend
from launch.loading import load_run, read_data_of
from launch.run_folder import read_catalog

TITLES = [
    "Heat (1995)",
    "Dead Heat (1988)",
    "Matrix, The (1999)",
    "Toy Story (1995)",
    "Fargo (1996)",
    "Fargo (1996)",
    "King Kong (1933)",
    "King Kong (1976)",
    "Krótki film o zabijaniu (1988)",
    '"Great Performances" Cats (1998)',
    "[rec] (2007)",
    "三国志",
    "Alien (1979)",
    "Aliens (1986)",
]


def make_catalog(titles: list[str], has_titles: bool = True) -> Catalog:
    raw_ids = tuple(f"B{item:03}" for item in range(1, len(titles) + 1))
    shown = tuple(titles) if has_titles else raw_ids
    return Catalog(("", *shown), ((),) * (len(titles) + 1), ("", *raw_ids), has_titles)


CATALOG = make_catalog(TITLES)


def recommended(capsys: pytest.CaptureFixture[str], run: Path, *flags: str) -> dict[str, Any]:
    assert recommend.main(["--run", str(run), *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- Titles as people type them ---


@pytest.mark.parametrize(
    ("typed", "title"),
    [
        *((title, title) for title in TITLES),
        ("heat", "Heat (1995)"),
        ("story toy", "Toy Story (1995)"),
        ("aliens", "Aliens (1986)"),
        ("Grate Performances Cats", '"Great Performances" Cats (1998)'),
        ("Haet (1995)", "Heat (1995)"),
        ("The Matrix", "Matrix, The (1999)"),
        ("matrix", "Matrix, The (1999)"),
        ("toy story", "Toy Story (1995)"),
        ("fargoo", "Fargo (1996)"),
        ("King Kong 1976", "King Kong (1976)"),
        ("Krotki film o zabijaniu", "Krótki film o zabijaniu (1988)"),
        ("great performances cats", '"Great Performances" Cats (1998)'),
        ("REC", "[rec] (2007)"),
    ],
)
def test_a_title_is_found(typed: str, title: str) -> None:
    (item,) = recommend.match_titles([typed], CATALOG)
    assert CATALOG.titles[item] == title


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("Toy Story 2", '"Toy Story 2" is unknown (closest: Toy Story (1995)'),
        ("Toy story ii", '"Toy story ii" is unknown (closest: Toy Story (1995)'),
        ("Heat (1996)", '"Heat (1996)" is unknown (closest: Heat (1995)'),
        ("King Kong", '"King Kong" could be King Kong (1933) or King Kong (1976)'),
        ("Nothing at all like these", '"Nothing at all like these" is unknown'),
        ("Performances", 'is unknown (closest: "Great Performances" Cats (1998))'),
        ("", '"" is unknown'),
        ("???", '"???" is unknown'),
    ],
)
def test_a_title_that_is_not_sure_is_refused(typed: str, answer: str) -> None:
    with pytest.raises(SystemExit, match=r"^error: in the catalogue of 14 titles") as exit:
        recommend.match_titles(["Heat (1995)", typed], CATALOG)
    assert answer in str(exit.value.code)
    assert 'Heat (1995)" is' not in str(exit.value.code), "the title that was found is no mistake"


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(SystemExit, match='"Nope nope" is unknown, and "Never ever" is unknown'):
        recommend.match_titles(["Nope nope", "Heat", "Never ever"], CATALOG)


def test_ids_must_be_typed_exactly() -> None:
    ids = make_catalog(TITLES, has_titles=False)
    assert recommend.match_titles(["B011", "B001"], ids).tolist() == [11, 1]
    with pytest.raises(SystemExit, match='"b001" is unknown'):
        recommend.match_titles(["b001"], ids)


def test_titles_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    recommend.show(CATALOG, np.array([11, 10]), np.array([11, 12]), np.array([1.0, 0.5]))
    shown = capsys.readouterr().out
    assert 'after [rec] (2007); "Great Performances" Cats (1998)' in shown
    assert shown.count("[rec] (2007)") == 2
    assert "三国志" in shown


# --- A trained run ---


def test_typed_titles(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = read_catalog(trained / "model" / "catalog.json")
    first, second = catalog.titles[7], catalog.titles[20]
    found = recommended(capsys, trained, "--history", first, second.lower(), first, "-k", "4")
    assert found["history"] == [first, second, first]
    rows = found["recommended"]
    assert len(rows) == 4
    assert not {first, second} & {row["title"] for row in rows}
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for row in rows:
        assert catalog.titles[catalog.raw_ids.index(row["item"])] == row["title"]


def test_the_order_of_a_history_counts(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles = read_catalog(trained / "model" / "catalog.json").titles[3:7]
    forwards = recommended(capsys, trained, "--history", *titles)
    backwards = recommended(capsys, trained, "--history", *titles[::-1])
    assert forwards["recommended"] != backwards["recommended"]


@pytest.mark.parametrize("include_seen", [False, True])
def test_a_user_of_the_data_set(trained: Path, capsys: pytest.CaptureFixture[str], include_seen: bool) -> None:
    run = load_run(trained)
    parts = read_data_of(run)
    items = parts.items[parts.offsets[4] : parts.offsets[5]]
    everything = str(run.catalog.num_items)
    flags = ["--include_seen"] if include_seen else []
    found = recommended(capsys, trained, "--user", parts.raw_users[4], "-k", everything, *flags)
    assert found["history"] == [run.catalog.titles[item] for item in items]
    seen = {run.catalog.raw_ids[item] for item in items}
    given = {row["item"] for row in found["recommended"]}
    assert given == set(run.catalog.raw_ids[1:]) - (set() if include_seen else seen)


def test_the_table(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recommend.main(["--run", str(trained), "--user", "1", "-k", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("after ... ")
    assert [f"│ {place} │" in shown for place in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--user", "1000"], "--user 1000 is not one of the 60 users"),
        (["--history", "Nothing at all like these"], '"Nothing at all like these" is unknown'),
        (["--user", "1", "-k", "0"], 2),
        (["--user", "1", "--history", "Heat"], 2),
        (["--history"], 2),
        ([], 2),
    ],
)
def test_what_cannot_be_done_is_refused(trained: Path, flags: list[str], code: str | int) -> None:
    with pytest.raises(SystemExit) as exit:
        recommend.main(["--run", str(trained), *flags])
    assert str(code) in str(exit.value.code)
