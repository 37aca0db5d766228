"""A run that is asked to stop has saved within seconds, says so with code 143, and can be started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks.processes import ROOT, run, start
from tests.runs import SMALL, At, losses, results

TRAINER, EVALUATOR = "trainers.loop", "evaluation.evaluator"
# Each also waits for a minute there: only a run that obeys at once can end in time.
MOMENTS = {
    "reading the data": At("data.sources", "read_sample", 1, signal.SIGTERM, seconds=60),
    "a validation": At(EVALUATOR, "Evaluator._summarise", 2, signal.SIGTERM, seconds=60),
    "the evaluation of the test users": At(EVALUATOR, "Evaluator._summarise", 5, signal.SIGTERM, seconds=60),
}
SECONDS = 45


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    return run(*SMALL, output=tmp_path_factory.mktemp("undisturbed") / "run").folder


def assert_goes_on(folder: Path, undisturbed: Path) -> None:
    again = run(*SMALL, output=folder)
    assert again.process.exitcode == 0, again.text()
    assert losses(folder) == losses(undisturbed)
    assert results(folder)["test"] == results(undisturbed)["test"]


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_sigterm_is_obeyed_at_once(undisturbed: Path, tmp_path: Path, moment: At) -> None:
    stopped = start(*SMALL, output=tmp_path / "run", before=moment)
    assert stopped.wait(SECONDS) == 143
    assert "stopped by SIGTERM" in stopped.text()
    assert "Traceback" not in stopped.text()
    assert_goes_on(stopped.folder, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_step_is_finished_and_saved(undisturbed: Path, tmp_path: Path, number: int, code: int) -> None:
    moment = At(TRAINER, "learning_rate", 8, number)
    stopped = start(*SMALL, output=tmp_path / "run", before=moment)
    assert stopped.wait(SECONDS) == code, stopped.text()
    newest = (stopped.folder / "checkpoints/LATEST").read_text().strip()
    assert newest in ("step-00000008", "step-00000009")
    assert_goes_on(stopped.folder, undisturbed)


def launched(folder: Path, *launcher: str) -> subprocess.Popen[bytes]:
    """Start a run that would train for minutes, and wait until it trains."""
    command = [*launcher, str(ROOT / "launch/train.py"), *SMALL, "--train.epochs=2000", f"--output={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (folder / "metrics.jsonl").is_file() or process.poll() is not None, 90)
    assert process.poll() is None, "the run ended before it trained"
    return process


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.1)


@pytest.mark.slow
def test_sigterm_from_outside(tmp_path: Path) -> None:
    """The whole way: a command line, a signal from another process, the interpreter's own exit."""
    folder = tmp_path / "run"
    process = launched(folder, sys.executable)
    process.terminate()
    assert process.wait(SECONDS) == 143
    assert (folder / "checkpoints/LATEST").is_file()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_run_ends_with_its_launcher(tmp_path: Path, number: int) -> None:
    """`accelerate launch` passes no signal on to a single process: an orphan would train on, unseen."""
    folder = tmp_path / "run"
    process = launched(folder, sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu")
    process.send_signal(number)
    assert process.wait(SECONDS) == -number
    # The run holds its folder until it ends: an orphan would keep it.
    with FileLock(folder / ".lock", timeout=SECONDS):
        assert (folder / "checkpoints/LATEST").is_file()
    again = start(*SMALL, "--train.epochs=2000", "--train.max_steps=1", output=folder)
    assert again.wait() == 0, again.text()
    assert "resuming" in again.text()
