"""Real runs of launch/: each a process of its own, forked from one that has imported everything already."""

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # a run that takes longer hangs

# Small and quick, with everything on that must survive a crash: dropout, warm-up, accumulation, a moving rate.
SMALL = (
    "--model sasrec --data.source sample --data.sample_users 96 --data.sample_series 20 --method.window 12 "
    "--method.hidden_size 16 --method.num_blocks 1 --train.precision fp32 --train.trackers [] --train.epochs 3 "
    "--train.batch_size 16 --train.micro_batch_size 8 --train.lr 0.01 --train.schedule linear --train.warmup_steps 3 "
    "--train.log_every_steps 3 --train.save_every_steps 2"
).split()
# 94 training examples... every user: 6 steps an epoch, 18 in all, validated after steps 6, 12 and 18.

_context = multiprocessing.get_context("forkserver")


@dataclass
class Run:
    """A started run."""

    folder: Path
    process: BaseProcess
    output: Path

    def wait(self, seconds: float = SECONDS) -> int:
        """Return the exit code, negative for a signal; a run that does not end is killed, and an error."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {seconds} s:\n{self.text()}")
        return self.process.exitcode

    def text(self) -> str:
        return self.output.read_text()


def start(
    *arguments: str,
    output: Path,
    before: Callable[[], None] | None = None,
    script: str = "train",
    environment: dict[str, str] | None = None,
) -> Run:
    """Start launch/<script>.py; `before` runs in its process first, to plant a fault there."""
    log = output.with_name(f"{output.name}-{time.monotonic_ns()}.log")
    flag = "--output" if script in ("train", "describe") else "--run"
    everything = [*arguments, f"{flag}={output}"]
    os.environ["PYTHONPATH"] = str(ROOT)  # for the process that all are forked from
    _context.set_forkserver_preload(["launch.train", "launch.evaluate"])
    process = _context.Process(target=_main, args=(script, everything, str(log), before, environment or {}))
    process.start()
    return Run(output, process, log)


def run(*arguments: str, output: Path, before: Callable[[], None] | None = None) -> Run:
    """Start a training run and wait for its end."""
    started = start(*arguments, output=output, before=before)
    started.wait()
    return started


def start_ranks(
    *arguments: str,
    output: Path,
    processes: int = 2,
    before: Callable[[int], None] | None = None,
    script: str = "train",
    only: int | None = None,
    environment: dict[str, str] | None = None,
) -> list[Run]:
    """Start the processes of one run (or only one of them) with the environment of a launcher, one core each.

    `environment` is added to it.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return [
        start(
            *arguments,
            output=output,
            before=None if before is None else _BeforeRank(before, rank),
            script=script,
            environment={name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            | (environment or {}),
        )
        for rank in (range(processes) if only is None else [only])
    ]


@dataclass
class _BeforeRank:
    before: Callable[[int], None]
    rank: int

    def __call__(self) -> None:
        self.before(self.rank)


@dataclass
class At:
    """A fault: sends the process a signal right before the n-th call of a method, then waits in there for a while."""

    module: str
    method: str  # "Class.method" or "function"
    call: int
    signal_number: int = signal.SIGKILL
    seconds: float = 0.0

    def __call__(self) -> None:
        owner: Any = importlib.import_module(self.module)
        *path, name = self.method.split(".")
        for part in path:
            owner = getattr(owner, part)
        original, calls = getattr(owner, name), 0

        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                os.kill(os.getpid(), self.signal_number)
                time.sleep(self.seconds)
            return original(*args, **options)

        setattr(owner, name, wrapper)


def _main(
    script: str, arguments: list[str], log: str, before: Callable[[], None] | None, environment: dict[str, str]
) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    # As many cores as one process of a launch has, so that no sum is split among threads differently.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(environment.get("LOCAL_WORLD_SIZE", "1"))])
    if before is not None:
        before()
    sys.exit(importlib.import_module(f"launch.{script}").main(arguments))


def losses(folder: Path) -> list[dict[str, float]]:
    """Return the log lines of training, without what depends on the machine's speed."""
    varying = ("tokens_per_s", "samples_per_s", "peak_memory")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in varying} for line in lines if "loss" in line]


def validations(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("valid/") for name in line)]


def results(folder: Path) -> dict[str, Any]:
    """Return results.json, without what depends on the machine's speed."""
    found = json.loads((folder / "results.json").read_text())
    del found["timing"]
    for part in (found, *(found.get(name, {}) for name in ("valid", "test", "popularity"))):
        if "header" in part:  # a stage ranks nothing
            del part["header"]["seconds"]
    return found
