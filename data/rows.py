"""Read text with one event a line: fast when every row is well formed, exact about the rows that are not."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from .bad_rows import BadRowLog, BadRows
from .interactions import ItemText, RawEvents

_BLOCK_BYTES = 32 << 20  # bounds the memory of reading; about 1.3 million rows of MovieLens


@dataclass(frozen=True)
class RowFormat:
    """How the fields of a row are laid out; of the named fields only "user" and "item" are required."""

    fields: tuple[str, ...]  # user, item, rating, timestamp, title, categories; any other name is not read
    delimiter: str
    quoted: bool = False
    header: bool = False

    def split(self, line: str) -> list[str]:
        if self.quoted:
            return next(csv.reader([line], delimiter=self.delimiter))
        return line.split(self.delimiter)


def read_rows(path: Path, row_format: RowFormat, bad_rows: BadRowLog) -> RawEvents:
    """Events of one file in file order. An absent rating is 1; an absent timestamp is the row's number.

    Fractions of a timestamp are cut off. Malformed rows are left out and entered in `bad_rows`.
    """
    return events_from_table(pa.concat_tables([_no_rows(row_format), *_tables(path, row_format, bad_rows)]))


def events_from_table(table: pa.Table) -> RawEvents:
    """Columns user, item and, where there are any, rating, timestamp, title and categories -> events."""
    number_of_rows = table.num_rows
    columns = dict(zip(table.column_names, table.columns, strict=True))
    del table  # so that each column can go as soon as it is in one piece
    item = _one_chunk(columns.pop("item"))
    texts = _texts(item, columns.pop("title"), columns.pop("categories", None)) if "title" in columns else {}
    return RawEvents(
        user=_one_chunk(columns.pop("user")),
        item=item,
        rating=columns.pop("rating").to_numpy() if "rating" in columns else np.ones(number_of_rows, np.float32),
        timestamp=columns.pop("timestamp").to_numpy() if "timestamp" in columns else np.arange(number_of_rows),
        texts=texts,
    )


def text_lines(path: Path, encoding: str = "utf-8", first: int = 1) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not empty, from line `first` on."""
    with path.open(encoding=encoding, newline="\n") as file:
        for line_number, line in enumerate(file, start=1):
            if line_number >= first and (text := line.rstrip("\r\n")):
                yield line_number, text


def split_categories(text: str, separator: str = "|") -> tuple[str, ...]:
    """ "Comedy|Drama" -> ("Comedy", "Drama"); MovieLens writes an empty list as "(no genres listed)"."""
    return tuple(part for part in text.split(separator) if part and part != "(no genres listed)")


def _one_chunk(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _texts(item: pa.DictionaryArray, title: pa.ChunkedArray, category: pa.ChunkedArray | None) -> dict[str, ItemText]:
    """Title and categories from the first row of each item."""
    codes, first_row = np.unique(item.indices.to_numpy(), return_index=True)
    raw_ids = item.dictionary.take(pa.array(codes)).to_pylist()
    titles = title.take(pa.array(first_row)).to_pylist()
    categories: Sequence[str] = [""] * len(titles)
    if category is not None:
        categories = category.take(pa.array(first_row)).to_pylist()
    return {
        raw_id: ItemText(title or "", split_categories(of_item or ""))
        for raw_id, title, of_item in zip(raw_ids, titles, categories, strict=True)
    }


def _tables(path: Path, row_format: RowFormat, bad_rows: BadRowLog) -> Iterator[pa.Table]:
    """The file in blocks of whole lines; a block with a malformed row is read again without that row."""
    with path.open("rb") as file:
        line_number = 1
        if row_format.header:
            file.readline()
            line_number = 2
        while block := file.read(_BLOCK_BYTES) + file.readline():
            table = _parse(block, row_format)
            if table is None:
                block_without = _drop_bad_lines(block, line_number, path, row_format, bad_rows)
                table = _parse(block_without, row_format)
                if table is None:
                    raise BadRows(f"{path}, lines {line_number} ff.: cannot be read as {', '.join(row_format.fields)}.")
            line_number += block.count(b"\n")
            yield table


_TOKEN = pa.dictionary(pa.int32(), pa.string())
_LARGEST = {"rating": float(np.finfo(np.float32).max), "timestamp": 2.0**63 - 1024}  # that the type holds
_TYPES = {"user": _TOKEN, "item": _TOKEN, "rating": pa.float32(), "title": _TOKEN, "categories": _TOKEN}


def _no_rows(row_format: RowFormat) -> pa.Table:
    types = {**_TYPES, "timestamp": pa.int64()}
    return pa.table({name: pa.array([], types[name]) for name in row_format.fields if name in types})


def _parse(block: bytes, row_format: RowFormat) -> pa.Table | None:
    """The named columns of a block, or None when a row of it is malformed."""
    if not block.strip(b"\r\n"):
        return _no_rows(row_format)
    for timestamp_type in (pa.int64(), pa.float64()):  # some files write 8.8e8 or 881250949.0
        try:
            table = _parse_as(block, row_format, timestamp_type)
        except pa.ArrowInvalid:
            continue
        return _checked(table)
    return None


def _parse_as(block: bytes, row_format: RowFormat, timestamp_type: pa.DataType) -> pa.Table:
    names = [name or f"blank{i}" for i, name in enumerate(row_format.fields)]
    # An unnamed field must be empty: that is how "a::b" is read with the one-character delimiter ":".
    types = {name: pa.null() for name in names if name.startswith("blank")}
    types |= {name: _TYPES[name] for name in names if name in _TYPES} | {"timestamp": timestamp_type}
    return pacsv.read_csv(
        pa.BufferReader(block),
        read_options=pacsv.ReadOptions(column_names=names, block_size=4 << 20),
        parse_options=pacsv.ParseOptions(
            delimiter=row_format.delimiter, quote_char='"' if row_format.quoted else False
        ),
        convert_options=pacsv.ConvertOptions(
            column_types=types, include_columns=[name for name in names if name in types], null_values=[""]
        ),
    )


def _checked(table: pa.Table) -> pa.Table | None:
    """The table with integer timestamps, or None when an id is empty or a number is missing or not finite."""
    table = table.drop_columns([name for name in table.column_names if name.startswith("blank")])
    for name in _LARGEST:
        if name in table.column_names:
            column = table[name]
            in_range = pc.less_equal(pc.abs(pc.cast(column, pa.float64(), safe=False)), _LARGEST[name])  # false for NaN
            if column.null_count or not pc.all(in_range).as_py():
                return None
    for name in ("user", "item"):
        if any(pc.index(chunk.dictionary, "").as_py() >= 0 for chunk in table[name].chunks):
            return None
    if "timestamp" in table.column_names:
        index = table.column_names.index("timestamp")
        table = table.set_column(index, "timestamp", pc.cast(table["timestamp"], pa.int64(), safe=False))
    return table


def _drop_bad_lines(block: bytes, line_number: int, path: Path, row_format: RowFormat, bad_rows: BadRowLog) -> bytes:
    good = []
    for offset, line in enumerate(block.split(b"\n")):
        reason = _malformed(line, row_format)
        if reason is None:
            good.append(line)
        else:
            bad_rows.add(path, line_number + offset, line.decode("utf-8", "replace").rstrip("\r"), reason)
    return b"\n".join(good)


_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")


def _malformed(line: bytes, row_format: RowFormat) -> str | None:
    """Why the line cannot be read, or None. Empty lines are no rows."""
    try:
        text = line.decode("utf-8").rstrip("\r")
    except UnicodeDecodeError:
        return "not UTF-8"
    if not text:
        return None
    values = row_format.split(text)
    if len(values) != len(row_format.fields):
        expected = f"{len(row_format.fields)} fields separated by {row_format.delimiter!r}"
        return f"expected {expected}, found {len(values)}"
    for name, value in zip(row_format.fields, values, strict=True):
        if name in ("user", "item") and not value:
            return f"empty {name} id"
        if not name and value:
            return f"expected the separator {2 * row_format.delimiter!r}"
        if name in _LARGEST and not (_NUMBER.fullmatch(value) and abs(float(value)) <= _LARGEST[name]):
            return f"{name} {value!r} is not a finite number"
    return None
