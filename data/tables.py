"""Sources with named columns: CSV, Parquet, Hugging Face datasets and RecBole's atomic files."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .bad_rows import BadRowLog
from .config import Columns
from .interactions import ItemText, RawEvents, encode_ids
from .rows import RowFormat, events_from_table, read_rows, text_lines

_USUAL_NAMES = {
    "user": ("userId", "user_id", "user"),
    "item": ("movieId", "item_id", "item"),
    "rating": ("rating",),
    "timestamp": ("timestamp",),
    "title": ("title",),
    "categories": ("genres", "categories"),
}


def read_csv(path: Path, columns: Columns, bad_rows: BadRowLog) -> RawEvents:
    """A header and one event a line; the separator is what the header has most of: comma, tab, ; or |."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline().rstrip("\r\n")
    delimiter = max(",\t;|", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    row_format = RowFormat(_roles(names, columns, path), delimiter, quoted=True, header=True)
    return read_rows(path, row_format, bad_rows)


def read_parquet(path: Path, columns: Columns, bad_rows: BadRowLog) -> RawEvents:
    """One Parquet file, or a folder of them."""
    wanted = _wanted(pq.ParquetDataset(path).schema.names, columns, path)
    return _from_table(pq.read_table(path, columns=wanted), columns, path, bad_rows)


def read_huggingface(source: str, columns: Columns, bad_rows: BadRowLog) -> RawEvents:
    """A dataset of the hub, or a folder written by `save_to_disk`; of several splits the one named train."""
    import datasets  # takes a second, and only this reader needs it

    is_folder = Path(source).is_dir()
    loaded = datasets.load_from_disk(source) if is_folder else datasets.load_dataset(source)
    if isinstance(loaded, dict):
        if len(loaded) > 1 and "train" not in loaded:
            raise ValueError(f"{source} has the splits {', '.join(loaded)}; expected one, or one named train.")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    wanted = _wanted(loaded.column_names, columns, source)
    return _from_table(loaded.select_columns(wanted).with_format("arrow")[:], columns, source, bad_rows)


def read_atomic(inter: Path, columns: Columns, bad_rows: BadRowLog) -> RawEvents:
    """RecBole: NAME.inter and, beside it, NAME.item; tabs, and headers like `user_id:token`."""
    names = _atomic_header(inter)
    row_format = RowFormat(fields=_roles(names, columns, inter), delimiter="\t", header=True)
    events = read_rows(inter, row_format, bad_rows)
    item_file = inter.with_suffix(".item")
    return events._replace(texts=_read_atomic_items(item_file, columns, bad_rows)) if item_file.exists() else events


def _roles(header: Sequence[str], columns: Columns, source: Path | str) -> tuple[str, ...]:
    """For each column of the header what it holds (a key of _USUAL_NAMES), or a name that is not read."""
    roles = [f"other{i}" for i in range(len(header))]
    configured_for_any = vars(columns).values()
    for role, usual in _USUAL_NAMES.items():
        configured = getattr(columns, role)
        candidates = [configured] if configured else [name for name in usual if name not in configured_for_any]
        name = next((name for name in candidates if name in header), None)
        if name is not None:
            roles[header.index(name)] = role
        elif configured or role in ("user", "item"):
            raise ValueError(
                f"{source} has no {role} column {configured or ' or '.join(usual)}; its columns are "
                f"{', '.join(header)}. Name the right one with --data.columns.{role}."
            )
    return tuple(roles)


def _wanted(header: Sequence[str], columns: Columns, source: Path | str) -> list[str]:
    roles = _roles(header, columns, source)
    return [name for name, role in zip(header, roles, strict=True) if role in _USUAL_NAMES]


def _from_table(table: pa.Table, columns: Columns, source: Path | str, bad_rows: BadRowLog) -> RawEvents:
    by_role = {}
    for name, role in zip(table.column_names, _roles(table.column_names, columns, source), strict=True):
        if role in ("user", "item", "title", "categories"):
            by_role[role] = _as_text(table[name])
        elif role in _USUAL_NAMES:
            by_role[role] = _as_number(table[name], name, role, source)
    bad = _empty(by_role["user"]), _empty(by_role["item"])
    bad += tuple(_not_finite(by_role[role]) for role in ("rating", "timestamp") if role in by_role)
    any_bad = bad[0]
    for mask in bad[1:]:
        any_bad = pc.or_(any_bad, mask)
    good = pa.table(by_role).filter(pc.invert(any_bad))
    for row in pc.indices_nonzero(any_bad).to_pylist():
        values = ", ".join(f"{role}={column[row].as_py()!r}" for role, column in by_role.items())
        bad_rows.add(Path(source), row + 1, values, "empty id, or a number that is missing or not finite")

    types = {"rating": pa.float32(), "timestamp": pa.int64()}
    for index, role in enumerate(good.column_names):
        if role in types:
            good = good.set_column(index, role, pc.cast(good[role], types[role], safe=False))
        elif role in ("user", "item"):
            good = good.set_column(index, role, encode_ids(good[role]))
    return events_from_table(good)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings; lists, as some datasets keep their categories, are joined by |."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.binary_join(pc.cast(column, pa.list_(pa.string())), "|")
    return pc.cast(column, pa.string())


def _as_number(column: pa.ChunkedArray, name: str, role: str, source: Path | str) -> pa.ChunkedArray:
    """Numbers as they are, times as the integer that they are stored as, strings of digits as float64."""
    if pa.types.is_temporal(column.type):
        return pc.cast(pc.cast(column, pa.timestamp("us"), safe=False), pa.int64())
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column
    try:
        return pc.cast(column, pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{source}: column {name} has type {column.type}, expected numbers; "
            f"name the right one with --data.columns.{role}."
        ) from error


def _empty(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(column, ""), True)


def _not_finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.invert(pc.fill_null(pc.is_finite(column), False))


def _atomic_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [name.partition(":")[0] for name in file.readline().rstrip("\r\n").split("\t")]


def _read_atomic_items(path: Path, columns: Columns, bad_rows: BadRowLog) -> dict[str, ItemText]:
    """Titles "NAME (YEAR)" where there is a `release_year`; categories are separated by blanks."""
    header = _atomic_header(path)
    item = header.index(columns.item) if columns.item in header else 0
    title = _first_column(header, columns.title, ("title", "name"))
    categories = _first_column(header, columns.categories, ("genre", "categor", "class"))
    year = _first_column(header, None, ("release_year",))
    texts = {}
    for line_number, line in text_lines(path, first=2):
        values = line.split("\t")
        if len(values) != len(header):
            bad_rows.add(path, line_number, line, f"expected {len(header)} fields, found {len(values)}")
            continue
        name = values[title] if title is not None else ""
        if name and year is not None and values[year]:
            name = f"{name} ({values[year]})"
        texts[values[item]] = ItemText(name, tuple(values[categories].split()) if categories is not None else ())
    return texts


def _first_column(header: list[str], configured: str | None, parts: tuple[str, ...]) -> int | None:
    """The configured column, else the first whose name has one of the parts in it, earlier parts first."""
    if configured is not None and configured in header:
        return header.index(configured)
    return next((i for part in parts for i, name in enumerate(header) if part in name), None)
