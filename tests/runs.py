"""What tests of real runs share: a small run, a fault to plant in one, and what a run folder says."""

import importlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Small and quick, with everything on that must survive a crash: dropout, warm-up, accumulation, a moving rate.
SMALL = (
    "--model sasrec --data.source sample --data.sample_users 96 --data.sample_series 20 --method.window 12 "
    "--method.hidden_size 16 --method.num_blocks 1 --train.precision fp32 --train.trackers [] --train.epochs 3 "
    "--train.batch_size 16 --train.micro_batch_size 8 --train.lr 0.01 --train.schedule linear --train.warmup_steps 3 "
    "--train.log_every_steps 3 --train.save_every_steps 2"
).split()
# 94 training examples... every user: 6 steps an epoch, 18 in all, validated after steps 6, 12 and 18.


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
