"""MovieLens as published: 100K (u.data), 1M and 10M (.dat), 20M, 32M and latest-small (.csv)."""

import csv
from pathlib import Path

from . import tables
from .bad_rows import BadRowLog
from .config import Columns
from .interactions import ItemText, RawEvents
from .rows import RowFormat, read_rows, split_categories, text_lines


def read_u_data(folder: Path, bad_rows: BadRowLog) -> RawEvents:
    """MovieLens 100K: `u.data` (tabs), `u.item` (|, latin-1), `u.genre`."""
    row_format = RowFormat(fields=("user", "item", "rating", "timestamp"), delimiter="\t")
    events = read_rows(folder / "u.data", row_format, bad_rows)
    return events._replace(texts=_read_u_item(folder, bad_rows)) if (folder / "u.item").exists() else events


def _read_u_item(folder: Path, bad_rows: BadRowLog) -> dict[str, ItemText]:
    """`id|title|date|video date|url|` and one 0/1 flag a genre, in the order of `u.genre`."""
    genres = [line.split("|")[0] for _, line in text_lines(folder / "u.genre", "latin-1")]
    texts = {}
    for line_number, line in text_lines(folder / "u.item", "latin-1"):
        values = line.split("|")
        if len(values) != 5 + len(genres):
            bad_rows.add(
                folder / "u.item",
                line_number,
                line,
                f"expected {5 + len(genres)} fields, found {len(values)}",
            )
            continue
        flagged = (genre for genre, flag in zip(genres, values[5:], strict=True) if flag == "1")
        texts[values[0]] = ItemText(values[1], tuple(genre for genre in flagged if genre != "unknown"))
    return texts


def read_dat(folder: Path, bad_rows: BadRowLog) -> RawEvents:
    """MovieLens 1M and 10M: `ratings.dat` and `movies.dat`, fields separated by `::`."""
    row_format = RowFormat(fields=("user", "", "item", "", "rating", "", "timestamp"), delimiter=":")
    events = read_rows(folder / "ratings.dat", row_format, bad_rows)
    movies = folder / "movies.dat"
    return events._replace(texts=_read_movies_dat(movies, bad_rows)) if movies.exists() else events


def _read_movies_dat(path: Path, bad_rows: BadRowLog) -> dict[str, ItemText]:
    """`id::title::genre|genre`; 1M is latin-1, 10M is UTF-8. Titles may hold colons."""
    texts = {}
    for line_number, line in text_lines(path, "utf-8" if _is_utf8(path) else "latin-1"):
        raw_id, _, rest = line.partition("::")
        title, separator, genres = rest.rpartition("::")
        if separator and raw_id:
            texts[raw_id] = ItemText(title, split_categories(genres))
        else:
            bad_rows.add(path, line_number, line, "expected id::title::genres")
    return texts


def read_csv(folder: Path, columns: Columns, bad_rows: BadRowLog) -> RawEvents:
    """MovieLens 20M, 32M and latest-small: `ratings.csv` and `movies.csv`, UTF-8."""
    events = tables.read_csv(folder / "ratings.csv", columns, bad_rows)
    movies = folder / "movies.csv"
    return events._replace(texts=_read_movies_csv(movies, bad_rows)) if movies.exists() else events


def _read_movies_csv(path: Path, bad_rows: BadRowLog) -> dict[str, ItemText]:
    texts = {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        for row in rows:
            if len(row) == 3 and row[0]:
                texts[row[0]] = ItemText(row[1], split_categories(row[2]))
            elif row:
                bad_rows.add(path, rows.line_num, ",".join(row), "expected movieId,title,genres")
    return texts


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
