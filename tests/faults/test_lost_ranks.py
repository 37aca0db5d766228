"""A rank that is killed, hangs, stops or never comes ends the whole run in time, by name, and the run can go on."""

import importlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import Run, start, start_ranks
from tests.runs import SMALL, At, losses, results, validations
from trainers.watchdog import EXIT_LOST_RANK

TIMEOUT = 6.0  # seconds: nothing moves for so long, and half of it without a heartbeat
SLACK = 15.0  # of a machine that does other things too
SETTINGS = [*SMALL, f"--train.timeout_seconds={TIMEOUT}"]
pytestmark = pytest.mark.slow  # a minute of waiting for limits to pass
STEP, EVALUATION = ("trainers.loop", "Trainer._train_step"), ("evaluation.evaluator", "Evaluator._rank_batch")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that nothing happened to."""
    return finish(tmp_path_factory.mktemp("undisturbed") / "run")


def finish(folder: Path) -> Path:
    """Run two processes to the end, with a watchdog that would end them for a few seconds of nothing."""
    ranks = start_ranks(*SETTINGS, output=folder)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    assert "error" not in ranks[0].text() + ranks[1].text()
    return folder


def assert_goes_on(folder: Path, undisturbed: Path) -> None:
    finish(folder)
    assert losses(folder) == losses(undisturbed)
    assert validations(folder) == validations(undisturbed)
    assert results(folder) == results(undisturbed)
    assert (folder / "model/model.safetensors").read_bytes() == (undisturbed / "model/model.safetensors").read_bytes()


@dataclass
class OnRank:
    """A fault on one rank alone, which notes when it happened."""

    rank: int
    fault: At
    note: Path

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        owner, _, name = self.fault.method.rpartition(".")
        module = importlib.import_module(self.fault.module)
        self.fault()
        patched = getattr(module, owner)
        faulty, calls = getattr(patched, name), 0

        def noting(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == self.fault.call:
                self.note.write_text(str(time.monotonic()))
            return faulty(*args, **options)

        setattr(patched, name, noting)


@pytest.fixture
def disturbed(tmp_path: Path) -> Iterator[Callable[[int, At], tuple[list[Run], float]]]:
    """Start two ranks with a fault in one; return them, and how many seconds after it the other had ended."""
    started: list[Run] = []

    def disturb(faulty: int, fault: At) -> tuple[list[Run], float]:
        note = tmp_path / "moment"
        started.extend(start_ranks(*SETTINGS, output=tmp_path / "run", before=OnRank(faulty, fault, note)))
        assert started[1 - faulty].wait() == EXIT_LOST_RANK, started[0].text() + started[1].text()
        seconds = time.monotonic() - float(note.read_text())
        print(f"{seconds:.1f} s after rank {faulty}: {started[1 - faulty].text()}")
        return started, seconds

    yield disturb
    for rank in started:
        rank.process.kill()
        rank.process.join()


def assert_clear(survivor: Run, named: str) -> None:
    assert named in survivor.text()
    assert "Traceback" not in survivor.text()
    assert "goes on from the last checkpoint" in survivor.text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(undisturbed: Path, tmp_path: Path, disturbed, rank: int) -> None:
    step = int(np.random.default_rng().integers(2, 17))
    ranks, seconds = disturbed(rank, At(*STEP, step))
    assert ranks[rank].wait() == -signal.SIGKILL
    assert seconds < TIMEOUT + SLACK
    # Rank 0 hosts the rendezvous here, so nobody can tell whether it, its host or the network is gone.
    named = "has rank 0 or its host ended" if rank == 0 else f"rank 1 (host {os.uname().nodename}, pid "
    assert_clear(ranks[1 - rank], named)
    assert_goes_on(tmp_path / "run", undisturbed)


def test_a_rank_that_is_killed_in_an_evaluation(undisturbed: Path, tmp_path: Path, disturbed) -> None:
    ranks, seconds = disturbed(1, At(*EVALUATION, 2))
    assert seconds < TIMEOUT + SLACK
    assert_clear(ranks[0], f"pid {ranks[1].process.pid}) has not been heard of for")
    assert_goes_on(tmp_path / "run", undisturbed)


def test_a_stopped_rank(undisturbed: Path, tmp_path: Path, disturbed) -> None:
    """Its host's network could be cut as well: its heartbeats cease, and its connections stay open."""
    ranks, seconds = disturbed(1, At(*STEP, 7, signal.SIGSTOP))
    assert seconds < TIMEOUT + SLACK
    assert_clear(ranks[0], f"pid {ranks[1].process.pid}) has not been heard of for")
    ranks[1].process.kill()
    assert_goes_on(tmp_path / "run", undisturbed)


def test_a_hung_rank(undisturbed: Path, tmp_path: Path, disturbed) -> None:
    """Its main thread sleeps, while its heartbeats say so: it ends by itself too."""
    ranks, seconds = disturbed(1, At(*STEP, 9, signal.SIGCONT, seconds=600))
    assert ranks[1].wait() == EXIT_LOST_RANK
    assert TIMEOUT <= seconds < TIMEOUT + SLACK
    for rank in ranks:
        assert_clear(rank, f"pid {ranks[1].process.pid}) has not come past step 8 for")
        assert "it is in runs.py" in rank.text()
    assert_goes_on(tmp_path / "run", undisturbed)


def test_a_rank_that_fails_by_itself_is_quoted(tmp_path: Path) -> None:
    ranks = start_ranks(*SETTINGS, output=tmp_path / "run", before=_fail)
    assert [rank.wait() for rank in ranks] == [EXIT_LOST_RANK, 1]
    assert_clear(ranks[0], f"pid {ranks[1].process.pid}) ended: LookupError: of rank 1 alone")


def _fail(rank: int) -> None:
    if rank == 1:
        from trainers.loop import Trainer

        def fail(self: Trainer, *_: object) -> bool:
            raise LookupError("of rank 1 alone")

        Trainer._train_step = fail  # type: ignore[method-assign]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_starts(tmp_path: Path, missing: int) -> None:
    began = time.monotonic()
    (rank,) = start_ranks(*SETTINGS, output=tmp_path / "run", only=1 - missing)
    assert rank.wait() == EXIT_LOST_RANK, rank.text()
    assert time.monotonic() - began < TIMEOUT + SLACK
    assert ("rank 1 of 2 has not reached" if missing == 0 else "1 of 2 processes came to") in rank.text()
    for check in ("within 6 s", "--main_process_ip", "--machine_rank", "--train.timeout_seconds"):
        assert check in rank.text()
    assert "Traceback" not in rank.text()
    assert not (tmp_path / "run").exists()


def test_one_process_starts_no_watchdog(tmp_path: Path) -> None:
    alone = start(*SETTINGS, "--train.max_steps=1", output=tmp_path / "run", before=_forbid_watchdog)
    assert alone.wait() == 0, alone.text()


def _forbid_watchdog() -> None:
    from trainers.watchdog import Watchdog

    def refuse(*_: object) -> None:
        raise AssertionError("a watchdog for one process")

    Watchdog.__init__ = refuse  # type: ignore[method-assign]
