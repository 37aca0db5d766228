"""Two real processes train like one: the same losses, the same figures, and they stop and go on together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.processes import ROOT, Run, run, start, start_ranks
from tests.runs import SMALL, At, losses, results, validations
from trainers.watchdog import EXIT_LOST_RANK

# Dropout differs from process to process, so that is off; steps of 16 are 2 x 8, as two micro-batches or processes.
EXACT = [*SMALL, "--method.dropout=0"]
# Float32 sums in another order; the losses themselves are near 4.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    finished = run(*EXACT, output=tmp_path_factory.mktemp("one") / "run")
    assert finished.process.exitcode == 0, finished.text()
    return finished.folder


def assert_same_trajectory(folder: Path, reference: Path) -> None:
    ours, theirs = losses(folder), losses(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm", "lr"):
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in theirs], rtol=0, atol=TOLERANCE
        )
    for own, reference_line in zip(validations(folder), validations(reference), strict=True):
        # A difference in the sixth digit may swap two items that score alike.
        assert own["valid/NDCG@10"] == pytest.approx(reference_line["valid/NDCG@10"], abs=0.005)


def wait(ranks: list[Run]) -> list[int]:
    return [rank.wait() for rank in ranks]


@pytest.mark.slow
def test_accelerate_launch_trains_two_processes_like_one(one_process: Path, tmp_path: Path) -> None:
    """The whole way of a user, with trackers: launcher, configuration, gloo, DDP."""
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/ddp.yaml"]
    script = ["--num_processes=2", "launch/train.py", *EXACT, '--train.trackers=["tensorboard"]', f"--output={folder}"]
    done = subprocess.run([*launch, *script], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_trajectory(folder, one_process)
    ours, theirs = results(folder), results(one_process)
    assert (ours["header"].pop("world_size"), theirs["header"].pop("world_size")) == (2, 1)
    assert ours["header"] == theirs["header"]
    assert ours["popularity"]["NDCG@10"] == theirs["popularity"]["NDCG@10"]
    assert ours["test"]["NDCG@10"] == pytest.approx(theirs["test"]["NDCG@10"], abs=0.005)
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2
    assert list((folder / "shardrec").glob("events.*")), "the tracker wrote on the main process"
    assert done.stdout.count("DDP, 2 processes") == 1, "one process speaks"


def test_uneven_shares_change_nothing(tmp_path: Path) -> None:
    """Steps of 10 examples in passes of 4: the first process does 4 + 2, the second 4; the last step has 6."""
    settings = [*EXACT, "--train.batch_size=10", "--train.micro_batch_size=4"]
    one = run(*settings, output=tmp_path / "one")
    ranks = start_ranks(*settings, output=tmp_path / "two")
    assert wait(ranks) == [0, 0], ranks[0].text() + ranks[1].text()
    assert_same_trajectory(tmp_path / "two", one.folder)


def test_dropout_differs_between_processes(tmp_path: Path) -> None:
    """Were both to drop the same units, two processes would be worth less than one twice as large."""
    ranks = start_ranks(*SMALL, "--train.max_steps=2", output=tmp_path / "run", before=_log_random_numbers)
    assert wait(ranks) == [0, 0]
    numbers = [[line for line in rank.text().splitlines() if line.startswith("random")] for rank in ranks]
    assert len(numbers[0]) == len(numbers[1]) == 2
    assert len({*numbers[0], *numbers[1]}) == 4


def _log_random_numbers(rank: int) -> None:
    import torch

    from trainers.runtime import Runtime

    clip = Runtime.clip_grad_norm

    def clip_and_log(self, model):
        print("random", torch.rand(()).item(), flush=True)
        return clip(self, model)

    Runtime.clip_grad_norm = clip_and_log  # type: ignore[method-assign]


def test_evaluation_is_the_same_to_the_last_bit(one_process: Path) -> None:
    """The same weights, ranked by one process and by two."""
    written: list[tuple[dict, pd.DataFrame]] = []
    for processes in (1, 2):
        ranks = start_ranks("--batch_size=10", output=one_process, processes=processes, script="evaluate")
        assert wait(ranks) == [0] * processes, ranks[0].text()
        (report,) = (one_process / "evaluations").glob("*.json")
        figures = json.loads(report.read_text())
        assert figures["header"].pop("world_size") == processes
        for header in (figures["header"], figures["popularity"]["header"]):
            del header["seconds"]
            header.pop("world_size", None)
        written.append((figures, pd.read_parquet(report.with_suffix(".parquet"))))
        report.unlink()
    (one, one_ranks), (two, two_ranks) = written
    assert one == two
    pd.testing.assert_frame_equal(one_ranks, two_ranks, check_exact=True)


def _signal_to(rank: int) -> None:
    if rank == 1:
        At("trainers.loop", "learning_rate", 8, signal.SIGTERM)()


def test_a_signal_to_one_process_stops_both_at_the_same_step(one_process: Path, tmp_path: Path) -> None:
    ranks = start_ranks(*EXACT, output=tmp_path / "run", before=_signal_to)
    assert wait(ranks) == [143, 143], ranks[0].text() + ranks[1].text()
    assert "stopped by SIGTERM" in ranks[0].text()
    # Both go on, here as one process: the order of examples does not depend on how many there are.
    again = run(*EXACT, output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert "resuming" in again.text()
    assert_same_trajectory(tmp_path / "run", one_process)


def _kill(rank: int) -> None:
    if rank == 1:
        # Saved after step 10, with step 10 alone in the window of the next log line.
        At("trainers.loop", "Trainer._train_step", 11)()


def test_a_killed_process_ends_the_other_and_both_can_go_on(one_process: Path, tmp_path: Path) -> None:
    ranks = start_ranks(*EXACT, output=tmp_path / "run", before=_kill)
    first, second = wait(ranks)
    assert (first, second) == (EXIT_LOST_RANK, -signal.SIGKILL)
    ranks = start_ranks(*EXACT, output=tmp_path / "run")
    assert wait(ranks) == [0, 0], ranks[0].text() + ranks[1].text()
    assert "resuming" in ranks[0].text()
    assert_same_trajectory(tmp_path / "run", one_process)


def _poison(rank: int) -> None:
    import torch

    from models.sasrec import SASRec

    loss = SASRec.loss

    def poisoned(self, batch):
        out = loss(self, batch)
        return out._replace(total=out.total * torch.nan if rank == 1 else out.total)

    SASRec.loss = poisoned  # type: ignore[method-assign]


def test_a_loss_that_fails_on_one_process_stops_both(tmp_path: Path) -> None:
    ranks = start_ranks(*EXACT, output=tmp_path / "run", before=_poison)
    assert wait(ranks) == [1, 1], ranks[0].text() + ranks[1].text()
    reports = [json.loads((tmp_path / f"run/non_finite_step_{rank}.json").read_text()) for rank in range(2)]
    assert [report["step"] for report in reports] == [1, 1]
    assert reports[0]["loss"] != "nan"
    assert reports[1]["loss"] == "nan"
    assert not (tmp_path / "run/checkpoints").exists()


def _move_run_folder(rank: int) -> None:
    """As on two hosts without a shared file system: the second process sees another, empty run folder."""
    if rank == 1:
        from trainers.checkpoint import Checkpoints

        Checkpoints.latest = lambda self: None  # type: ignore[method-assign]


def test_processes_that_do_not_share_the_run_folder_are_refused(tmp_path: Path) -> None:
    killed = start(*EXACT, output=tmp_path / "run", before=At("trainers.loop", "Trainer._train_step", 8))
    assert killed.wait() == -signal.SIGKILL
    ranks = start_ranks(*EXACT, output=tmp_path / "run", before=_move_run_folder)
    assert all(wait(ranks))
    assert "must be on a file system that all processes share" in ranks[0].text() + ranks[1].text()
