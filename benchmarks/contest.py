"""Contestants that take turns at the same work, and what is kept of it: shared by all comparisons.

A contestant is a process of its own where it needs its own environment or its own peak of memory; between its rounds
it waits and takes no processor time. Standard library only at the top, for peers' environments import this file.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / ".venv-bench" / "bin" / "python"  # where peers are that clash with our own versions

# Of our own loop, whatever a recipe says: a constant rate, no decay, clipping, validation or trackers.
PLAIN_LOOP = (
    "--train.schedule constant --train.warmup_steps 0 --train.weight_decay 0 --train.max_grad_norm 0 "
    "--train.epochs 1000 --train.eval_every_epochs 1000 --train.trackers []"
).split()
# With one thread, processor seconds are what a round takes, which hardly depend on what else the machine does.
THREADS = int(os.environ.get("THREADS", "2"))
QUIET = 0.1  # cores that other processes may have meanwhile without a word of it in docs/results.md

Round = dict[str, float]  # "seconds", and what else a contestant tells of a round


class Turns:
    """A contestant's own side: it says when it is ready, then does as many steps as it is told, and waits again."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever libraries print goes elsewhere
        self._left = 0
        self._clock: Clock | None = None

    def ready(self, **facts: Any) -> None:
        """Tell what will be timed: versions, threads, parameters."""
        self._before = _peak_memory()
        self._tell(facts)

    def step(self, report: Callable[[], Round]) -> None:
        """Call before every step; `report` tells of the round that has ended, its loss for example."""
        if self._left == 0:
            if self._clock is not None:
                self._finish(self._clock.read(), report())
            self._left, self._clock = self._next_turn(), Clock()
        self._left -= 1

    def serve(self, work: Callable[[int], Round]) -> NoReturn:
        """Do rounds of a given size until the contest is over; for what has no training loop of its own."""
        while True:
            size, clock = self._next_turn(), Clock()
            report = work(size)
            self._finish(clock.read(), report)

    def _finish(self, times: Round, report: Round) -> None:
        memory: Round = {"peak_memory": _peak_memory(), "memory_before": self._before}
        self._tell(times | memory | report)

    def _next_turn(self) -> int:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the contest is over, and nothing is to be saved
        return int(line)

    def _tell(self, values: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(values) + "\n")


class Contestant:
    """The referee's side of a process that has `Turns`."""

    def __init__(self, command: list[str], interpreter: Path = Path(sys.executable), threads: int = THREADS) -> None:
        if not interpreter.is_file():
            sys.exit(f"error: {interpreter} is missing: `make peers` makes it")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}  # torch, tokenizers
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
        self._process = subprocess.Popen(
            [str(interpreter), *command],
            cwd=ROOT,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.facts = self._answer()

    def round(self, size: int) -> Round:
        """Let it do `size` steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()
        return self._answer()

    def leave(self) -> None:
        """Let it end, and give its memory back."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args!r} ended early:\n{self._log.read()[-4000:]}")
        return json.loads(line)


def take_part(main: Callable[[], None], peers: Mapping[str, Callable[..., None]]) -> None:
    """Run a comparison, or the side of it that this process was started for: a peer by its name, or our own loop."""
    if sys.argv[1:2] != ["worker"]:
        main()
    elif sys.argv[2] in peers:
        peers[sys.argv[2]](*sys.argv[3:])
    else:
        from benchmarks.training import train

        train(sys.argv[2:], Turns())


def take_turns(contestants: Mapping[str, Callable[[], Round]], repeats: int) -> dict[str, list[Round]]:
    """Return the rounds of each, one after the other in every repeat; a first one warms up and is not counted."""
    rounds: dict[str, list[Round]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, play in contestants.items():
            one = play()
            rounds[name].append(one)
            print(name, {key: float(f"{value:.4g}") for key, value in one.items()}, flush=True)
    return {name: played[1:] for name, played in rounds.items()}


def others_of(rounds: Iterable[Round]) -> float:
    """Return the cores that other processes had on average; a host that lends cores elsewhere counts as one."""
    rounds = list(rounds)
    return sum(one["others"] for one in rounds) / sum(one["seconds"] for one in rounds)


def timed(work: Callable[[], Round | None]) -> Callable[[], Round]:
    """Return a contestant of this process; `work` may tell of its round."""

    def play() -> Round:
        clock = Clock()
        told = work()
        return clock.read() | (told or {})

    return play


class Clock:
    """Seconds since it was made, and what processor seconds other processes had meanwhile."""

    def __init__(self) -> None:
        self._began, self._own, self._busy = time.perf_counter(), _own_seconds(), _busy_seconds()

    def read(self) -> Round:
        passed, own = time.perf_counter() - self._began, _own_seconds() - self._own
        others = _busy_seconds() - self._busy - own
        return {"seconds": own if THREADS == 1 else passed, "others": max(others, 0.0)}


def _own_seconds() -> float:
    """Return the processor seconds of this process, and all those of children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _busy_seconds() -> float:
    """Return the processor seconds of all processes since the machine started; 0 where Linux does not tell."""
    try:
        user, nice, system, _, _, irq, soft_irq, steal = Path("/proc/stat").read_text().split()[1:9]
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, irq, soft_irq, steal))) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 4), "lower_quartile": round(low, 4), "upper_quartile": round(high, 4)}


def which_seconds(threads: int) -> str:
    return "one thread, processor seconds" if threads == 1 else f"{threads} threads"


def compare(
    rounds: Mapping[str, list[Round]],
    what: str,
    ours: str,
    peer: str,
    *,
    key: str = "seconds",
    unit: str = "s",
    aim: float | None,
    beside: str = "",
) -> dict[str, Any]:
    """Return a row of the table of docs/results.md: a figure that should be small, and the peer's over ours.

    Ratios are taken within a repeat; `aim` is what was aimed at. `beside` tells of quality where the work differs.
    """
    here, there = ([played[key] for played in rounds[name]] for name in (ours, peer))
    ratio = [slow / quick for quick, slow in zip(here, there, strict=True)]
    row: dict[str, Any] = {"what": what, "ours": ours, "peer": peer, "unit": unit, "aim": aim, "beside": beside}
    row |= {"here": spread(here), "there": spread(there), "ratio": spread(ratio)}
    others = others_of([*rounds[ours], *rounds[peer]]) if THREADS > 1 else 0.0
    return row | {"others": round(others, 2)}


def keep(
    name: str,
    command: str,
    settings: Mapping[str, Any],
    rounds: Mapping[str, list[Round]],
    comparisons: list[dict[str, Any]],
) -> None:
    """Write what was measured, with the machine that it was measured on, for benchmarks/speed.py."""
    from benchmarks.document import hardware

    report: dict[str, Any] = {"command": command, "hardware": hardware(), "threads": THREADS, **settings}
    report |= {"rounds": rounds, "comparisons": comparisons}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in comparisons:
        print(f"{row['what']}: {row['ratio']['median']:.2f} times {row['peer']}, aim {row['aim']} {row['beside']}")


def _peak_memory() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
