"""Sources without times: one sequence a line, and the rows of LLaRA and iLoRA, which come already split."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .bad_rows import BadRowLog
from .interactions import ItemText, RawEvents, Role, encode_ids
from .rows import text_lines


def read_sequences(path: Path, bad_rows: BadRowLog) -> RawEvents:
    """Lines `user item item ...`, oldest item first; the timestamp of an event is its position."""
    sequences: list[tuple[str, list[str]]] = []
    for line_number, line in text_lines(path):
        user, *items = line.split()
        if items:
            sequences.append((user, items))
        else:
            bad_rows.add(path, line_number, line, "expected a user and at least one item")
    return _events(sequences)


def read_llara_rows(folder: Path, bad_rows: BadRowLog) -> RawEvents:
    """`train.jsonl`, `valid.jsonl`, `test.jsonl` of {"history": [<= 10 ids], "next": id}, and `id2name.txt`.

    Successive training rows become one user as long as each history is the one before plus its target. Every
    validation and test row is a user of its own, whose history is context only. Ids count from 0; the number
    of names is the padding.
    """
    texts = _read_names(folder / "id2name.txt", bad_rows)
    padding = len(texts)
    users = list(_chain(_read_rows(folder / "train.jsonl", bad_rows), padding))
    sequences = [(f"train-{number:06d}", items) for number, items in enumerate(users)]
    roles = [Role.TRAIN] * sum(len(items) for items in users)
    for phase, role in (("valid", Role.VALID), ("test", Role.TEST)):
        for number, (history, target) in enumerate(_read_rows(folder / f"{phase}.jsonl", bad_rows)):
            context = [item for item in history if item != padding]
            sequences.append((f"{phase}-{number:06d}", [*context, target]))
            roles += [Role.CONTEXT] * len(context) + [role]
    events = _events([(user, [str(item) for item in items]) for user, items in sequences])
    return events._replace(texts=texts, presplit=np.array(roles, dtype=np.int8))


_LLARA_WINDOW = 10  # items that a history keeps

_Row = tuple[list[int], int]  # history, next


def _chain(rows: Iterator[_Row], padding: int) -> Iterator[list[int]]:
    """Sequences of users from overlapping windows."""
    sequence: list[int] = []
    for padded_history, target in rows:
        history = [item for item in padded_history if item != padding]
        if not history or history != sequence[-_LLARA_WINDOW:]:
            if sequence:
                yield sequence
            sequence = history
        sequence = [*sequence, target]
    if sequence:
        yield sequence


def _read_rows(path: Path, bad_rows: BadRowLog) -> Iterator[_Row]:
    for line_number, line in text_lines(path):
        try:
            row = json.loads(line)
            yield [int(item) for item in row["history"]], int(row["next"])
        except (ValueError, KeyError, TypeError):
            bad_rows.add(path, line_number, line, 'expected {"history": [ids], "next": id}')


def _read_names(path: Path, bad_rows: BadRowLog) -> dict[str, ItemText]:
    texts = {}
    for line_number, line in text_lines(path):
        raw_id, separator, name = line.partition("::")
        if separator:
            texts[raw_id] = ItemText(name, ())
        else:
            bad_rows.add(path, line_number, line, "expected id::name")
    return texts


def _events(sequences: list[tuple[str, list[str]]]) -> RawEvents:
    lengths = [len(items) for _, items in sequences]
    timestamp = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0, np.int64)
    return RawEvents(
        user=encode_ids([user for user, items in sequences for _ in items]),
        item=encode_ids([item for _, items in sequences for item in items]),
        rating=np.ones(len(timestamp), dtype=np.float32),
        timestamp=timestamp,
        texts={},
    )
