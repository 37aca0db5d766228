"""metrics.jsonl after any crash, and numbers that reach a tracker."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainers.progress import Progress
from trainers.runtime import Runtime
from trainers.tracking import Tracking


def line(step: int, **values: float) -> str:
    return json.dumps({"step": step, **values}) + "\n"


LINES = [line(2, loss=1.0), line(4, loss=0.9), line(4, **{"valid/HR@10": 0.1}), line(6, loss=0.8)]
LINES += [line(8, loss=0.7), line(8, **{"valid/HR@10": 0.2}), line(10, loss=0.6)]


@pytest.mark.parametrize(
    ("progress", "kept"),
    [
        (Progress(step=8, validated_step=8), LINES[:6]),
        (Progress(step=8, validated_step=4), LINES[:5]),  # stopped between the step and its validation
        (Progress(step=7, validated_step=4), LINES[:4]),
        (Progress(), []),
    ],
)
def test_a_resumed_run_writes_no_line_twice(runtime: Runtime, tmp_path: Path, progress, kept: list[str]) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(LINES))
    Tracking(runtime, tmp_path, 10, {}, progress)
    assert file.read_text() == "".join(kept)


@pytest.mark.parametrize("torn", ['{"step": 9, "lo', '{"step": 9, "loss": 0.5}', '{"step": 9}'])
def test_a_line_that_was_cut_off_is_dropped(runtime: Runtime, tmp_path: Path, torn: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(LINES[0] + torn)
    tracking = Tracking(runtime, tmp_path, 10, {}, Progress(step=20))
    tracking.log({"step": 21, "epoch": 0, "loss": 0.5, "samples_per_s": 1.0, "tokens_per_s": 1.0})
    lines = file.read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == [2, 21]


def test_trackers_get_every_number(tmp_path: Path) -> None:
    own = Runtime("fp32", ["tensorboard"], tmp_path)
    tracking = Tracking(own, tmp_path, 10, {"train": {"lr": 0.1}, "names": ["a"]}, Progress())
    for step, loss in ((1, 0.75), (2, 0.5)):
        tracking.log({"step": step, "epoch": 0, "loss": loss, "samples_per_s": 1.0, "tokens_per_s": 2.0})
    with tracking:
        pass  # leaving the block writes what is still in memory
    events = EventAccumulator(str(tmp_path / "shardrec")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.75), (2, 0.5)]
    own.close()
