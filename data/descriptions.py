"""Users and items in words, written ahead of training: what each text may read, and the folder that keeps the texts.

A user's text is written as of an event and reads only training events before it. The file of texts is a cache by
content: a line's key is a hash of who wrote it and of all that it read, so that texts of histories that have not
changed are found again, and those of others are missed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np

from .description_prompts import (
    Event,
    Words,
    event_facts,
    item_prompt,
    item_template,
    user_prompt,
    user_template,
)
from .interactions import Catalog
from .prompts import title_texts
from .splits import Split
from .teacher_labels import cut_torn_line
from .title_tokens import ends_of, ranges

TEXTS, MANIFEST = "texts.jsonl", "manifest.json"
Kind = Literal["item", "user"]


@dataclass
class DescriptionSettings:
    """Which texts there are, and what a user's text reads."""

    words: Words = "movie"
    """What items are called: movie, or item for any other catalogue."""
    profile_every: int = 10
    """A user's text is written anew after so many training events, so that a training target finds one that has not
    read it; and at the end of the training part. 0: only there, so that training targets find none."""
    history_length: int = 30
    """Newest events that a user's text reads."""

    def __post_init__(self) -> None:
        for name, least in (("profile_every", 0), ("history_length", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"texts.{name} {value}: expected at least {least}")


class Subject(NamedTuple):
    """What a text is about, and all that it reads."""

    kind: Kind
    name: str  # raw id
    as_of: int  # a user's events that come before the text; 0 for an item
    events: tuple[Event, ...]  # what is told of a user, oldest first, or the item alone

    def key(self, writer: str) -> str:
        """What the text by this writer is kept under."""
        facts = "\n".join((writer, self.kind, *map(event_facts, self.events)))
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    def template(self, words: Words) -> str:
        """The text that needs no language model."""
        if self.kind == "item":
            return item_template(words, self.events[0].title, self.events[0].categories)
        return user_template(words, self.events)

    def prompt(self, words: Words) -> str:
        """What a language model is asked."""
        if self.kind == "item":
            return item_prompt(words, self.events[0].title, self.events[0].categories)
        return user_prompt(words, self.events)


class Profiles(NamedTuple):
    """When users are described: a row a text, by user and then by how much it reads."""

    user: np.ndarray  # [R] int64
    as_of: np.ndarray  # [R] int64, 1..train_end: the text reads the user's events before this position

    @classmethod
    def of(cls, split: Split, every: int) -> Self:
        counts = np.where(split.train_end > 0, 1, 0)
        if every:
            counts = -(-split.train_end // every)
        user = np.repeat(np.arange(split.num_users), counts)
        as_of = ranges(np.ones_like(counts), counts) * (every or np.iinfo(np.int32).max)
        return cls(user, np.minimum(as_of, split.train_end[user]))


@dataclass(frozen=True)
class Descriptions:
    """The texts of a split, read back."""

    item_texts: list[str]  # [N + 1]; entry 0, padding, is empty
    user_texts: list[str]  # [R + 1]; entry 0 is empty: nothing is written of that user before that event
    offsets: np.ndarray  # [U + 1] int64: the texts of user u are the rows 1 + offsets[u] .. offsets[u + 1]
    as_of: np.ndarray  # [R + 1] int64: how many events of its user each text follows; 0 for row 0

    def user_rows(self, user: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """The newest text of each user [n] that reads only events before position `cut` [n]: rows of `user_texts`."""
        stride = int(max(self.as_of.max(), cut.max(initial=0))) + 1
        owner = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        row = np.searchsorted(owner * stride + self.as_of[1:], user * stride + cut, side="right")
        return np.where(row > self.offsets[user], row, 0)

    @classmethod
    def read(cls, folder: Path, split: Split, catalog: Catalog) -> Self:
        """Read what launch/describe.py wrote of this split; raises ValueError where a text is missing.

        Nobody has written of the users of a split without hash: their histories are new. Templates do it here.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no descriptions: {error}") from error
        settings, writer, known = DescriptionSettings(**manifest["texts"]), manifest["writer"], read_texts(folder)
        everything = list(subjects(split, catalog, settings))
        templated = [subject.kind == "user" and not split.hash for subject in everything]
        keys = [subject.key(writer) for subject in everything]
        missing = sum(key not in known and not own for key, own in zip(keys, templated, strict=True))
        if missing:
            raise ValueError(
                f"{folder} lacks {missing} of {len(keys)} descriptions of split {split.hash[:12]} (it was written for "
                f"{manifest['split'][:12]}): run launch/describe.py with the --data.* flags of this run"
            )
        texts = [
            subject.template(settings.words) if own else known[key]
            for subject, key, own in zip(everything, keys, templated, strict=True)
        ]
        return cls._of(texts, split, settings)

    @classmethod
    def of_templates(cls, split: Split, catalog: Catalog, settings: DescriptionSettings) -> Self:
        """What needs no folder."""
        return cls._of([s.template(settings.words) for s in subjects(split, catalog, settings)], split, settings)

    @classmethod
    def _of(cls, texts: list[str], split: Split, settings: DescriptionSettings) -> Self:
        """Put the texts of all `subjects` in their places."""
        profiles = Profiles.of(split, settings.profile_every)
        offsets = ends_of(np.bincount(profiles.user, minlength=split.num_users))
        as_of = np.concatenate([[0], profiles.as_of])
        return cls(["", *texts[: split.num_items]], ["", *texts[split.num_items :]], offsets, as_of)


def subjects(split: Split, catalog: Catalog, settings: DescriptionSettings) -> Iterator[Subject]:
    """Everything to describe: the items 1..N, then the users by `Profiles`."""
    named = [Event(*pair, None) for pair in zip(title_texts(catalog), catalog.categories, strict=True)]
    for item in range(1, catalog.num_items + 1):
        yield Subject("item", catalog.raw_ids[item], 0, (named[item],))
    tell = len(np.unique(split.ratings)) > 1  # a source without ratings gives all events the same one
    ratings = split.ratings.tolist() if tell else [None] * len(split.items)
    for user, as_of in zip(*map(np.ndarray.tolist, Profiles.of(split, settings.profile_every)), strict=True):
        end = int(split.offsets[user]) + as_of
        read = range(end - min(as_of, settings.history_length), end)
        events = tuple(named[split.items[event]]._replace(rating=ratings[event]) for event in read)
        yield Subject("user", split.raw_users[user], as_of, events)


def write_manifest(folder: Path, split: Split, writer: str, settings: DescriptionSettings, about: object) -> None:
    """Say for which split and by whom the texts are; `writer` is the digest that keys are made with."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{MANIFEST}.unfinished"
    unfinished.write_text(
        json.dumps({"split": split.hash, "writer": writer, "texts": asdict(settings), "about": about}, indent=1)
    )
    unfinished.replace(folder / MANIFEST)


def read_texts(folder: Path) -> dict[str, str]:
    """The texts of a folder by key; an unfinished last line is left out. Raises ValueError for a line that is none."""
    known = {}
    path = folder / TEXTS
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break
                try:
                    fields = json.loads(line)
                    known[fields["key"]] = fields["text"]
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: not a description ({error})") from error
    return known


def append(folder: Path, writer: str, written: Iterable[tuple[Subject, str]]) -> None:
    """Add texts behind the last whole line, and have them on disk."""
    lines = [
        json.dumps({"key": s.key(writer), "kind": s.kind, "name": s.name, "as_of": s.as_of, "text": text})
        for s, text in written
    ]
    with open(folder / TEXTS, "a+b") as file:
        cut_torn_line(file)
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
