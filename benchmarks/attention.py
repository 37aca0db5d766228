"""Attention in training on a CPU: models/attention.py beside torch's own, alone and in whole training steps.

python benchmarks/attention.py          (two minutes on one thread; writes its table into docs/results.md)

Both take turns, forward and backward. Steps are those of a recipe in bf16, and nothing else changes between the turns.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from benchmarks.contest import PLAIN_LOOP, RESULTS, ROOT
from benchmarks.document import hardware, write_section
from benchmarks.machine import train
from benchmarks.training import make_trainer_of
from models import attention
from trainers.signals import Stop

COMMAND, REPEATS = "benchmarks/attention.py", 9
CASES = {  # rows, heads, events or tokens, width of a head; type; dropout
    "64 texts of 64 tokens, 12 heads of 32": ((64, 12, 64, 32), torch.bfloat16, 0.0),
    "16 prompts of 148 tokens, 4 heads of 32": ((16, 4, 148, 32), torch.bfloat16, 0.0),
    "8 prompts of 190 tokens, 9 heads of 64": ((8, 9, 190, 64), torch.bfloat16, 0.0),
    "128 histories of 200 events, 2 heads of 64": ((128, 2, 200, 64), torch.bfloat16, 0.0),
    "the same, dropout .3": ((128, 2, 200, 64), torch.bfloat16, 0.3),
    "the same in float32, dropout .3": ((128, 2, 200, 64), torch.float32, 0.3),
}
RECIPES = {"BIGRec": "ml-100k/bigrec.yaml", "E4SRec": "ml-100k/e4srec.yaml", "SASRec": "ml-100k/sasrec.yaml"}
STEPS = 4


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = {f"attention, {name}": in_turns(*attention_ways(*case)) for name, case in CASES.items()}
    with Stop() as stop, TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            flags = [f"--recipe={ROOT / 'launch' / 'recipes' / recipe}", *PLAIN_LOOP, f"--output={folder}/{name}"]
            trainer = make_trainer_of([*flags, "--train.precision=bf16"], stop)
            steps = [step for _, step in zip(range(STEPS), trainer.loader.epoch(0), strict=False)]
            trainer.model.train()

            def ours(trainer: Any = trainer, steps: Any = steps) -> None:
                train(trainer, steps)

            def torchs(ours: Callable[[], None] = ours) -> None:
                with patch.object(attention, "_is_quicker", lambda *_: False):
                    ours()

            measured[f"{name}, {STEPS} steps of its MovieLens 100K recipe"] = in_turns(ours, torchs)
    (RESULTS / "attention.json").write_text(json.dumps({"hardware": hardware(), "seconds": measured}, indent=1) + "\n")
    write_section(ROOT / "docs" / "results.md", COMMAND, markdown(measured))
    print(markdown(measured))


def attention_ways(
    shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    parts = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, dtype=dtype)

    def way(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        return lambda: function(*parts, is_causal=True, dropout_p=dropout_p).backward(grad)

    return way(attention.attention), way(F.scaled_dot_product_attention)


def in_turns(ours: Callable[[], None], torchs: Callable[[], None]) -> dict[str, list[float]]:
    """Processor seconds of every turn but the first, which warms up."""
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for _ in range(REPEATS + 1):
        for name, way in (("ours", ours), ("torch", torchs)):
            began = time.process_time()
            way()
            seconds[name].append(time.process_time() - began)
    return {name: values[1:] for name, values in seconds.items()}


def markdown(measured: dict[str, dict[str, list[float]]]) -> str:
    machine = hardware()
    lines = [
        f"{machine['device']}, {machine['threads']} thread, torch {machine['packages']['torch']}; bf16 unless it says "
        f"otherwise; processor time, medians of {REPEATS} turns, the ratio within a turn.",
        "",
        "| what | torch, ms | here, ms | ratio |",
        "|" + " --- |" * 4,
    ]
    for name, seconds in measured.items():
        times = " | ".join(f"{1000 * statistics.median(seconds[way]):.1f}" for way in ("torch", "ours"))
        ratio = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["ours"], strict=True))
        lines.append(f"| {name} | {times} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
