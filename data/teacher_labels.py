"""What a teacher says of candidates, one JSON line a history: written bit by bit, read back by those who learn from it.

A line names the user and the cut (how many events the history has), the candidates as they were shown, the teacher's
rank and score of each (higher is better; softmax of scores is meaningful where the teacher gives logits), whether its
answer was a permutation, and of what all this is made: phase, split, run, weights and prompt.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from .interactions import Catalog
from .splits import Split


@dataclass(frozen=True)
class Source:
    """Of what a file of labels is made: alike in all its lines."""

    phase: str
    split: str  # its hash
    run: str
    weights: str  # their checksum
    prompt: str  # the digest of what prompts are made of


class Label(NamedTuple):
    """One judged list."""

    user: str
    cut: int
    candidates: list[str]  # raw ids, as they were listed
    ranks: list[int]  # of those, 1 for the best
    scores: list[float]
    status: str  # see data.permutations

    def line(self, source: Source) -> str:
        """The label as a line of a file."""
        return json.dumps(self._asdict() | asdict(source), separators=(",", ":")) + "\n"


class Judged(NamedTuple):
    """Those of some rows that have labels."""

    row: np.ndarray  # [n] int64, index into the rows
    candidates: np.ndarray  # [n, C] int64, the teacher's best first


@dataclass(frozen=True)
class TeacherLabels:
    """The labels of one file, as numbers of this split and catalogue."""

    user: np.ndarray  # [n] int64
    cut: np.ndarray  # [n] int64
    candidates: np.ndarray  # [n, C] int64, the teacher's best first
    source: Source

    @classmethod
    def read(cls, path: Path, split: Split, catalog: Catalog) -> Self:
        """Read a file to train with: its sound answers about training events of this split.

        Raises ValueError where it is of another split or phase, or holds an event that is held out.
        """
        lines = list(read_lines(path))
        if not lines:
            raise ValueError(f"--method.labels {path} holds no labels: let launch/label.py write them")
        source = source_of(lines[0])
        if source.split != split.hash or source.phase != "train":
            raise ValueError(
                f"--method.labels {path} holds labels of phase {source.phase}, split {source.split[:12]}: expected "
                f"phase train of split {split.hash[:12]}"
            )
        number_of = {raw: number for number, raw in enumerate(split.raw_users)}
        item_of = {raw: item for item, raw in enumerate(catalog.raw_ids) if item}
        sound = [line for line in lines if line["status"] == "ok"]
        if len({len(line["candidates"]) for line in sound}) != 1:
            raise ValueError(f"--method.labels {path}: expected sound answers, with as many candidates in each")
        user = np.array([number_of[line["user"]] for line in sound], dtype=np.int64)
        cut = np.array([line["cut"] for line in sound], dtype=np.int64)
        require_training_events(split, user, cut)
        listed = np.array([[item_of[raw] for raw in line["candidates"]] for line in sound], dtype=np.int64)
        best_first = np.argsort([line["ranks"] for line in sound], axis=1, kind="stable")
        return cls(user, cut, np.take_along_axis(listed, best_first, axis=1), source)

    def among(self, user: np.ndarray, cut: np.ndarray) -> Judged:
        """Those of these rows that are judged; raises ValueError where none is."""
        place = {event: index for index, event in enumerate(zip(self.user.tolist(), self.cut.tolist(), strict=True))}
        events = zip(user.tolist(), cut.tolist(), strict=True)
        found = [(row, place[event]) for row, event in enumerate(events) if event in place]
        if not found:
            raise ValueError("--method.labels judges none of the training events: lower --method.prompts.min_history")
        row, index = np.array(found, dtype=np.int64).T
        return Judged(row, self.candidates[index])


def require_training_events(split: Split, user: np.ndarray, cut: np.ndarray) -> None:
    """Raise ValueError where a cut asks for an event that is not a training event of its user."""
    held_out = cut >= split.train_end[user]
    if held_out.any():
        which = int(held_out.argmax())
        raise ValueError(
            f"event {cut[which]} of user {split.raw_users[user[which]]} is held out for validation or test: no label "
            "for training may be made of it"
        )


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file; raises ValueError for one that is no label. An unfinished last line is left out."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                label = json.loads(line)
                Label(*(label[name] for name in Label._fields))
                source_of(label)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a label ({error})") from error
            yield label


def source_of(line: dict[str, Any]) -> Source:
    return Source(**{name: line[name] for name in Source.__dataclass_fields__})


def judged_before(path: Path, source: Source) -> set[tuple[str, int]]:
    """The users and cuts that a file holds already; raises ValueError where it is made of something else."""
    if not path.exists():
        return set()
    done = set()
    for line in read_lines(path):
        if source_of(line) != source:
            raise ValueError(
                f"--output {path} holds labels of {source_of(line)}, and these would be of {source}: name another file"
            )
        done.add((line["user"], line["cut"]))
    return done


def append(path: Path, labels: Iterable[Label], source: Source) -> None:
    """Add labels to a file, behind its last whole line, and have them on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        cut_torn_line(file)
        file.write("".join(label.line(source) for label in labels).encode())
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(file: Any) -> None:
    """Drop what stands behind the last newline: the line that a killed process was writing."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            file.truncate(start + newline + 1)
            return
        end = start
    file.truncate(0)
