"""launch/slurm.sbatch by itself: Slurm's commands and the launcher are played by small scripts.

docs/slurm.md says how to try it on a real Slurm of one machine.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.processes import ROOT

COMMANDS = {
    "srun": 'shift; SLURM_NODEID=0 setsid "$@" & echo $! > step; wait $!; wait $!',  # without --kill-on-bad-exit=1
    "scontrol": '[ "$1" = show ] && echo node1 || echo "$@" >> requeued',
    "scancel": 'kill -USR1 -- -"$(cat step)"; echo "$@" >> signals',  # reaches every process of the step
    "squeue": 'cat state',
    # A launcher with the training process inside: it saves on USR1, which the launcher itself must have been spared.
    "python": 'echo "$@" > flags; touch started; eval "$BEHAVIOUR"',
}  # fmt: skip
TRAINS = "while [ ! -f signals ]; do sleep 0.1; done; "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, body in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/bash\n{body}\n")
        command.chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    return tmp_path


def submit(folder: Path, behaviour: str, *flags: str) -> subprocess.Popen[str]:
    job = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }
    mine = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": str(folder / "bin/python"), "BEHAVIOUR": behaviour}
    script = ["bash", str(ROOT / "launch/slurm.sbatch"), *flags]
    environment = os.environ | job | mine | {"PROCESSES_PER_NODE": "4"}
    return subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def signal_once_started(job: subprocess.Popen[str], folder: Path) -> None:
    while not (folder / "started").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)


def test_a_run_that_finishes(folder: Path) -> None:
    job = submit(folder, "exit 0", "--model", "bigrec", "--train.trackers", "[]")
    assert job.wait(20) == 0
    assert not (folder / "requeued").exists()
    flags = (folder / "flags").read_text()
    assert flags.endswith("launch/train.py --model bigrec --train.trackers []\n")
    for flag in ("--num_machines 2", "--num_processes 8", "--machine_rank 0", "--main_process_ip node1"):
        assert flag in flags


def test_a_run_that_fails_does_not_go_back_to_the_queue(folder: Path) -> None:
    assert submit(folder, "exit 1").wait(20) == 200
    assert not (folder / "requeued").exists()


def test_a_run_that_was_asked_to_stop_goes_back_to_the_queue(folder: Path) -> None:
    job = submit(folder, TRAINS + "exit 1")
    signal_once_started(job, folder)
    while not (folder / "requeued").exists():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.terminate()  # as Slurm does with a job that is requeued
    assert job.wait(90) != 0
    assert (folder / "signals").read_text() == "--signal=USR1 77.0\n"
    assert (folder / "requeued").read_text() == "requeue 77\n"


@pytest.mark.parametrize(("end", "state", "code"), [("exit 0", "RUNNING", 0), ("exit 1", "CANCELLED", 138)])
def test_one_that_finished_all_the_same_or_was_cancelled_stays_ended(folder: Path, end: str, state: str, code: int):
    (folder / "state").write_text(f"{state}\n")
    job = submit(folder, TRAINS + end)
    signal_once_started(job, folder)
    assert job.wait(30) == code
    assert not (folder / "requeued").exists()
