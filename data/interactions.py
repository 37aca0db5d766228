"""Validated interactions: raw event columns in, numbered users and items in time order out."""

import enum
import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .config import DataConfig


@dataclass(frozen=True)
class Catalog:
    """What is known of each item; entry i belongs to item i, entry 0 is padding ("" or ())."""

    titles: tuple[str, ...]  # [N + 1]; an item without a title has its raw id here
    categories: tuple[tuple[str, ...], ...]  # [N + 1]
    raw_ids: tuple[str, ...]  # [N + 1]
    has_titles: bool  # False when every title is only a raw id

    @property
    def num_items(self) -> int:
        return len(self.raw_ids) - 1

    @property
    def text_hash(self) -> str:
        """sha256 over one line "raw id<TAB>title<TAB>categories, comma-separated<LF>" an item, items ascending.

        Publishers of the same events write some texts otherwise.
        """
        digest = hashlib.sha256()
        for raw_id, title, categories in zip(self.raw_ids[1:], self.titles[1:], self.categories[1:], strict=True):
            digest.update(f"{raw_id}\t{title}\t{','.join(categories)}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Interactions:
    """Every event that passed the filters, sorted stably by (user, timestamp, row in the file).

    Users 0..U-1 and items 1..N are numbered by ascending raw id: as numbers when all raw ids are integers,
    else as strings. Raises ValueError when columns and catalogue do not fit together.
    """

    name: str  # of the dataset, for result headers
    user: np.ndarray  # [E] int32, 0..U-1
    item: np.ndarray  # [E] int64, 1..N
    timestamp: np.ndarray  # [E] int64, in the unit of the source
    rating: np.ndarray  # [E] float32
    catalog: Catalog
    raw_users: tuple[str, ...]  # [U]
    presplit: np.ndarray | None = None  # [E] int8, see Role; only for sources that come already split

    def __post_init__(self) -> None:
        columns = [self.user, self.item, self.timestamp, self.rating]
        columns += [] if self.presplit is None else [self.presplit]
        if len({column.shape for column in columns}) != 1:
            raise ValueError(f"{self.name}: columns of different lengths: {[column.shape for column in columns]}")
        if not len(self.user):
            raise ValueError(f"{self.name}: there are no events.")
        if self.item.min() < 1 or self.item.max() > self.catalog.num_items:
            raise ValueError(f"{self.name}: item numbers must be in 1..{self.catalog.num_items}.")
        if self.user.min() < 0 or self.user.max() >= len(self.raw_users):
            raise ValueError(f"{self.name}: user numbers must be in 0..{len(self.raw_users) - 1}.")


class Role(enum.IntEnum):
    """The part that an event of an already split source plays (values of `Interactions.presplit`)."""

    CONTEXT = -1
    TRAIN = 0
    VALID = 1
    TEST = 2


class ItemText(NamedTuple):
    """What a source says of one item."""

    title: str
    categories: tuple[str, ...]


class RawEvents(NamedTuple):
    """Events as read, in file order; ids are dictionary-encoded strings: 20 bytes an event."""

    user: pa.DictionaryArray  # [E]
    item: pa.DictionaryArray  # [E]
    rating: np.ndarray  # [E] float32
    timestamp: np.ndarray  # [E] int64
    texts: dict[str, ItemText]  # raw item id -> title and categories; may lack items
    presplit: np.ndarray | None = None  # [E] int8


def build_interactions(name: str, events: RawEvents, config: DataConfig) -> Interactions:
    """Apply the filters of `config` (rating, duplicates, k-core), number what is left and sort it by time.

    Of repeated events the first or last in time counts. Raises ValueError when nothing is left, naming the
    filter, or when a filter would change a source that is already split.
    """
    if events.presplit is not None:
        _refuse_filters_on_split_source(name, config)
    user, raw_users = _rank_ids(events.user)
    item, raw_items = _rank_ids(events.item)

    rows = np.lexsort((events.timestamp, user))  # stable: ties keep their row order
    if config.min_rating > 0:
        rows = rows[events.rating[rows] >= config.min_rating]
    _stop_if_empty(name, rows, f"--data.min_rating {config.min_rating}")
    if config.duplicates != "keep":
        rows = rows[_distinct(user[rows], item[rows], keep=config.duplicates)]
    if max(config.user_core, config.item_core) > 1:
        rows = rows[_core(user[rows], item[rows], config.user_core, config.item_core)]
    _stop_if_empty(name, rows, _filter_flags(config))

    user, raw_users = _compact(user[rows], raw_users, np.int32)
    item, raw_items = _compact(item[rows], raw_items, np.int64, first=1)
    return Interactions(
        name=name,
        user=user,
        item=item,
        timestamp=events.timestamp[rows],
        rating=events.rating[rows],
        catalog=_catalog(raw_items, events.texts),
        raw_users=tuple(raw_users),
        presplit=None if events.presplit is None else events.presplit[rows],
    )


_INTEGER = re.compile(r"0|-?[1-9][0-9]*")  # "007" is no integer here: it would fall together with "7"


def _rank_ids(ids: pa.DictionaryArray) -> tuple[np.ndarray, list[str]]:
    """Codes [E] int32 into ascending raw ids: as numbers if all are integers, else as strings."""
    raw_ids = ids.dictionary.to_pylist()
    as_number = all(_INTEGER.fullmatch(raw_id) for raw_id in raw_ids)
    order = sorted(range(len(raw_ids)), key=lambda i: int(raw_ids[i]) if as_number else raw_ids[i])
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank[ids.indices.to_numpy()], [raw_ids[i] for i in order]


def _distinct(user: np.ndarray, item: np.ndarray, keep: str) -> np.ndarray:
    """Ascending positions of the first or last event of each (user, item) pair; events are in time order."""
    pair = user.astype(np.int64) * (int(item.max()) + 1) + item
    if keep == "first":
        return np.sort(np.unique(pair, return_index=True)[1])
    return np.sort(len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1])


def _core(user: np.ndarray, item: np.ndarray, user_core: int, item_core: int) -> np.ndarray:
    """The largest set of events in which each user has >= user_core and each item >= item_core: positions."""
    kept = np.arange(len(user))
    while len(kept):
        enough_of_user = (np.bincount(user[kept]) >= user_core)[user[kept]]
        enough_of_item = (np.bincount(item[kept]) >= item_core)[item[kept]]
        enough = enough_of_user & enough_of_item
        if enough.all():
            break
        kept = kept[enough]
    return kept


def _compact(
    codes: np.ndarray, raw_ids: Sequence[str], dtype: type[np.integer], first: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Renumber codes [E] from `first` without gaps, in the same order, and keep the raw ids that still occur."""
    present = np.bincount(codes, minlength=len(raw_ids)) > 0
    numbers = (np.cumsum(present) - 1 + first).astype(dtype)
    return numbers[codes], list(itertools.compress(raw_ids, present))


def _catalog(raw_items: Sequence[str], texts: dict[str, ItemText]) -> Catalog:
    known = [texts.get(raw_id, ItemText("", ())) for raw_id in raw_items]
    return Catalog(
        titles=("", *(text.title or raw_id for text, raw_id in zip(known, raw_items, strict=True))),
        categories=((), *(text.categories for text in known)),
        raw_ids=("", *raw_items),
        has_titles=any(text.title for text in known),
    )


def encode_ids(values: pa.Array | pa.ChunkedArray | Sequence[str]) -> pa.DictionaryArray:
    """Ids of any type -> dictionary-encoded strings in one chunk."""
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, pa.string())
    encoded = pc.dictionary_encode(pc.cast(array, pa.string()))
    return encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded


def _filter_flags(config: DataConfig) -> str:
    flags = [f"--data.min_rating {config.min_rating}"] if config.min_rating > 0 else []
    flags += [f"--data.user_core {config.user_core}"] if config.user_core > 0 else []
    flags += [f"--data.item_core {config.item_core}"] if config.item_core > 0 else []
    return " ".join(flags)


def _stop_if_empty(name: str, rows: np.ndarray, flags: str) -> None:
    if not len(rows):
        raise ValueError(f"{name}: no events are left after {flags or 'reading'}; lower the filters that are set.")


def _refuse_filters_on_split_source(name: str, config: DataConfig) -> None:
    flags = _filter_flags(config) + (f" --data.duplicates {config.duplicates}" if config.duplicates != "keep" else "")
    if flags:
        raise ValueError(f"{name} comes already split, and filtering would change its targets; drop {flags.strip()}.")
