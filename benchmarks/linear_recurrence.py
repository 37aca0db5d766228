"""LRURec's recurrence in parallel against one step after the other, forward and backward.

python benchmarks/linear_recurrence.py          (a minute on one thread; writes its table into docs/methods/)

The loop is plain PyTorch, whose steps autograd records. Both take turns, so that they meet the same machine, and are
checked to agree.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from benchmarks.document import hardware, write_section
from models.linear_recurrence import linear_recurrence

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "linear-recurrence.json"
CHANNELS = 128  # of LRURec's default width
SHAPES = [(16, 50), (16, 200), (128, 50), (128, 200)]  # rows and events
REPEATS = 15


def one_by_one(inputs_BLC: Tensor, decay_C: Tensor) -> Tensor:
    state, states = torch.zeros_like(inputs_BLC[:, 0]), []
    for step in inputs_BLC.unbind(1):
        state = step + decay_C * state
        states.append(state)
    return torch.stack(states, dim=1)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = [measure(rows, length) for rows, length in SHAPES]
    RESULTS.write_text(json.dumps({"hardware": hardware(), "channels": CHANNELS, "shapes": measured}, indent=1))
    write_section(
        ROOT / "docs" / "methods" / "sasrec-lrurec-gru4rec.md", "benchmarks/linear_recurrence.py", markdown(measured)
    )


def measure(rows: int, length: int) -> dict[str, Any]:
    """Return the seconds of every round of both ways, and their largest difference."""
    decay = torch.polar(torch.empty(CHANNELS).uniform_(0.8, 0.99), 2 * torch.pi * torch.rand(CHANNELS))
    operands = [torch.randn(rows, length, CHANNELS, dtype=torch.complex64).requires_grad_(), decay.requires_grad_()]
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"loop": one_by_one, "parallel": linear_recurrence}
    weights = torch.randn(rows, length, CHANNELS, 2)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Tensor]] = {}
    for _ in range(REPEATS + 1):  # the first one warms up
        for name, way in ways.items():
            started = time.process_time()
            states = torch.view_as_real(way(*operands))
            gradients = torch.autograd.grad((states * weights).sum(), operands)
            seconds[name].append(time.process_time() - started)
            found[name] = [states.detach(), *gradients]
    pairs = zip(found["loop"], found["parallel"], strict=True)
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    assert difference < 1e-4, f"the two ways differ by {difference}"
    return {"rows": rows, "length": length, "difference": difference, "seconds": {n: s[1:] for n, s in seconds.items()}}


def markdown(measured: list[dict[str, Any]]) -> str:
    machine = hardware()
    lines = [
        f"{machine['device']}, {machine['threads']} thread, torch {machine['packages']['torch']}; {CHANNELS} complex64 "
        f"channels; forward and backward, processor time, medians of {REPEATS} rounds, the ratio within a round.",
        "",
        "| rows x events | loop, ms | parallel, ms | loop / parallel |",
        "| --- | --- | --- | --- |",
    ]
    for shape in measured:
        loop, parallel = shape["seconds"]["loop"], shape["seconds"]["parallel"]
        ratio = statistics.median(a / b for a, b in zip(loop, parallel, strict=True))
        times = " | ".join(f"{1000 * statistics.median(values):.1f}" for values in (loop, parallel))
        lines.append(f"| {shape['rows']} x {shape['length']} | {times} | {ratio:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
