"""Labels of a teacher: torn lines, foreign files, held-out events, and orders that come back as they were given."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.candidate_store import training_cuts
from data.config import DataConfig
from data.sources import read
from data.splits import split
from data.teacher_labels import (
    Label,
    Source,
    TeacherLabels,
    append,
    judged_before,
    read_lines,
    require_training_events,
)
from evaluation.teacher_audit import audit, kendall_tau

SAMPLE = DataConfig(source="sample", sample_users=20, sample_series=8)


@pytest.fixture(scope="module")
def data():
    interactions = read(SAMPLE)
    return interactions.catalog, split(interactions, SAMPLE)


def source_for(parts, **changes: str) -> Source:
    return replace(Source("train", parts.hash, "teacher", "abc", "def"), **changes)


def some_labels(catalog, parts, count: int = 8) -> list[Label]:
    cuts = training_cuts(parts)
    raw = [catalog.raw_ids[item] for item in (5, 3, 9)]
    users = [parts.raw_users[user] for user in cuts.user[:count]]
    rows = zip(users, cuts.position[:count].tolist(), strict=True)
    return [Label(user, cut, raw, [2, 3, 1], [0.5, -1.0, 2.0], "ok") for user, cut in rows]


def test_labels_come_back_as_items_in_the_teachers_order(tmp_path: Path, data) -> None:
    catalog, parts = data
    file, labels = tmp_path / "deep" / "labels.jsonl", some_labels(*data)
    labels[1] = labels[1]._replace(status="wrong_format")
    append(file, labels[:3], source_for(parts))
    append(file, labels[3:], source_for(parts))
    found = TeacherLabels.read(file, parts, catalog)
    assert found.candidates.tolist() == [[9, 5, 3]] * 7  # the answer that could not be read teaches nothing
    cuts = training_cuts(parts)
    judged = found.among(cuts.user, cuts.position)
    assert judged.row.tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert judged.candidates.tolist() == [[9, 5, 3]] * 7
    with pytest.raises(ValueError, match="judges none"):
        found.among(cuts.user[20:], cuts.position[20:])


def test_a_torn_line_is_left_out_and_written_again(tmp_path: Path, data) -> None:
    file, labels, source = tmp_path / "labels.jsonl", some_labels(*data), source_for(data[1])
    append(file, labels[:5], source)
    whole = file.read_bytes()
    for torn in (1, 40, len(whole) // 5 + 3):
        file.write_bytes(whole[:-torn])
        done = judged_before(file, source)
        assert done == {(label.user, label.cut) for label in labels[: 5 - 1 - torn // (len(whole) // 5)]}
        append(file, [label for label in labels[:5] if (label.user, label.cut) not in done], source)
        assert [json.loads(line)["cut"] for line in file.read_text().splitlines()] == [
            label.cut for label in labels[:5]
        ]
    file.write_bytes(whole[:20])  # nothing but a torn line
    append(file, labels[:1], source)
    assert len(list(read_lines(file))) == 1
    file.write_bytes(whole + b'{"user": 1}\n')
    with pytest.raises(ValueError, match="line 6: not a label"):
        list(read_lines(file))


@pytest.mark.parametrize("change", [{"weights": "other"}, {"prompt": "other"}, {"split": "other"}, {"phase": "valid"}])
def test_a_file_of_something_else_is_not_gone_on_with(tmp_path: Path, data, change: dict[str, str]) -> None:
    _, parts = data
    file = tmp_path / "labels.jsonl"
    append(file, some_labels(*data), source_for(parts))
    with pytest.raises(ValueError, match="name another file"):
        judged_before(file, source_for(parts, **change))


def test_nothing_that_is_held_out_is_learned_from(tmp_path: Path, data) -> None:
    catalog, parts = data
    for phase in (parts.valid, parts.test):
        with pytest.raises(ValueError, match="is held out"):
            require_training_events(parts, phase.user, phase.position)
        file = tmp_path / "held-out.jsonl"
        user, cut = int(phase.user[0]), int(phase.position[0])
        label = some_labels(catalog, parts)[0]._replace(user=parts.raw_users[user], cut=cut)
        append(file, [label], source_for(parts))
        with pytest.raises(ValueError, match=f"event {cut} of user {parts.raw_users[user]} is held out"):
            TeacherLabels.read(file, parts, catalog)
        file.unlink()
    for changes in ({"phase": "valid"}, {"split": "0" * 64}):
        file = tmp_path / "foreign.jsonl"
        append(file, some_labels(catalog, parts), source_for(parts, **changes))
        with pytest.raises(ValueError, match="expected phase train of split"):
            TeacherLabels.read(file, parts, catalog)
        file.unlink()


def test_kendall_tau_and_the_audit() -> None:
    ranks = np.array([[1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 3, 4]])
    own = np.broadcast_to(np.arange(4), (3, 4))
    assert kendall_tau(ranks, own) == pytest.approx([1, -1, 1 - 2 / 6])
    figures = audit(ranks, np.array([0, 3, -1]), ["ok", "ok", "missing"])
    assert figures["next item among them"] == pytest.approx(2 / 3)
    assert figures["teacher NDCG@10"] == pytest.approx(2 / 3)  # first in both lists that hold it
    assert figures["retriever NDCG@10"] == pytest.approx((1 + 1 / np.log2(5)) / 3)
    assert figures["lists where the teacher is better"] == pytest.approx(1 / 3)
    assert figures["lists where it is worse"] == 0
    assert figures["answers"] == {"ok": 2, "missing": 1}
