"""A run folder belongs to one run: others are refused, naming what differs, and a finished one shows its results."""

import signal
import time
from pathlib import Path

import pytest

from benchmarks.processes import run, start
from tests.runs import SMALL, At, losses


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(*SMALL, output=tmp_path_factory.mktemp("finished") / "run").folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--method.hidden_size=8", "method.hidden_size: 16 there, 8 here"),
        ("--train.lr=0.5", "train.lr: 0.01 there, 0.5 here"),
        ("--train.batch_size=4", "train.batch_size: 16 there, 4 here"),
        ("--data.sample_seed=3", "data.sample_seed: 0 there, 3 here"),
    ],
)
def test_other_settings_are_refused_by_name(finished: Path, changed: str, named: str) -> None:
    before = contents(finished)
    refused = run(*SMALL, changed, output=finished)
    assert refused.process.exitcode == 1
    assert named in refused.text()
    assert "--output" in refused.text()
    assert "--resume never" in refused.text()
    assert contents(finished) == before


def test_an_unknown_setting_is_refused_with_the_closest_known_one(tmp_path: Path) -> None:
    refused = run(*SMALL, "--train.batchsize=4", output=tmp_path / "run")
    assert refused.process.exitcode != 0
    assert "train.batch_size" in refused.text()
    assert not (tmp_path / "run").exists()


def test_settings_of_speed_and_output_may_differ(tmp_path: Path) -> None:
    killed = run(*SMALL, output=tmp_path / "run", before=At("trainers.loop", "Trainer._train_step", 8))
    assert killed.process.exitcode == -signal.SIGKILL
    more = ["--train.eval_batch_size=7", "--train.log_every_steps=1", "--train.keep_checkpoints=2"]
    again = run(*SMALL, *more, output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert "resuming" in again.text()


def test_a_finished_run_shows_its_results_at_once(finished: Path) -> None:
    before = contents(finished)
    # Neither data nor model are touched: reading data would end this process.
    shown = run(*SMALL, output=finished, before=At("launch.train", "read_and_split", 1))
    assert shown.process.exitcode == 0, shown.text()
    assert "is finished" in shown.text()
    assert "NDCG@10" in shown.text()
    assert contents(finished) == before


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    first = start(*SMALL, "--train.epochs=2000", output=tmp_path / "run")
    try:
        end = time.monotonic() + 60
        while not (first.folder / "metrics.jsonl").is_file():
            assert time.monotonic() < end, first.text()
            time.sleep(0.1)
        second = run(*SMALL, "--train.epochs=2000", output=tmp_path / "run")
        assert second.process.exitcode == 1
        assert f"another run is using {first.folder}" in second.text()
        assert first.process.is_alive()
    finally:
        first.process.kill()
        first.wait()
    # A run that was killed holds nothing.
    after = run(*SMALL, "--train.epochs=2000", "--train.max_steps=1", output=tmp_path / "run")
    assert after.process.exitcode == 0, after.text()


def test_losses_are_logged_under_every_step(finished: Path) -> None:
    assert [line["step"] for line in losses(finished)] == [3, 6, 9, 12, 15, 18]
