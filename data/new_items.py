"""Items that a finished run has not met: a catalogue grows by a file of titles."""

import csv
from pathlib import Path

from .interactions import Catalog


def with_new_items(catalog: Catalog, file: Path) -> Catalog:
    """Return the catalogue with the items of a file behind its own.

    A .csv file has a column `title`, and perhaps `item` (raw ids) and `categories` (separated by |); any other file has
    a title a line. Raises ValueError where there are none, or where a raw id is taken.
    """
    with open(file, newline="", encoding="utf-8") as lines:
        if file.suffix == ".csv":
            rows = list(csv.DictReader(lines))
            if rows and "title" not in rows[0]:
                raise ValueError(f"{file} has the columns {', '.join(rows[0])}: expected one called title")
        else:
            rows = [{"title": line} for line in lines]
    rows = [row for row in rows if (row["title"] or "").strip()]
    if not rows:
        raise ValueError(f"{file} holds no titles: expected one a line, or a .csv file with a column title")
    raw_ids = [row.get("item") or f"new-{place}" for place, row in enumerate(rows, start=1)]
    taken = {*catalog.raw_ids}
    for raw_id in raw_ids:
        if raw_id in taken:
            raise ValueError(f"{file}: there is an item {raw_id} already; expected other ids in the column item")
        taken.add(raw_id)
    return Catalog(
        titles=(*catalog.titles, *(row["title"].strip() for row in rows)),
        categories=(
            *catalog.categories,
            *(tuple(filter(None, (row.get("categories") or "").split("|"))) for row in rows),
        ),
        raw_ids=(*catalog.raw_ids, *raw_ids),
        has_titles=True,
    )
