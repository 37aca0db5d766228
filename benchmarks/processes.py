"""Processes of launch/, each forked from one that has imported everything already, as a launcher would start them."""

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # a run that takes longer hangs

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
    flag = "--output" if script in ("train", "describe", "label") else "--run"
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


def launched(
    *arguments: str,
    output: Path,
    script: str = "train",
    processes: int = 1,
    environment: dict[str, str] | None = None,
    seconds: float = 600,
) -> str:
    """Wait for a run of one process, or of several, and return what the first one printed. Raises RuntimeError."""
    if processes == 1:
        ranks = [start(*arguments, output=output, script=script)]
    else:
        ranks = start_ranks(*arguments, output=output, script=script, processes=processes, environment=environment)
    codes = [rank.wait(seconds) for rank in ranks]
    if any(codes):
        texts = "\n".join(rank.text()[-4000:] for rank in ranks)
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{texts}")
    return ranks[0].text()


@dataclass
class _BeforeRank:
    before: Callable[[int], None]
    rank: int

    def __call__(self) -> None:
        self.before(self.rank)


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
