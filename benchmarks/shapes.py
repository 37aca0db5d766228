"""Training with batches that are padded to few lengths, beside batches as long as their longest row.

python benchmarks/shapes.py          (three minutes on two cores; writes its table into docs/results.md)

Each is a process of its own, since kernels that oneDNN has built for a shape stay. They train the same steps in turns,
every one of them new, as in a first epoch.
"""

import json
import statistics
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import (
    PLAIN_LOOP,
    RESULTS,
    ROOT,
    THREADS,
    Contestant,
    Round,
    Turns,
    take_part,
    take_turns,
    which_seconds,
)

COMMAND, STEPS, REPEATS = "benchmarks/shapes.py", 6, 5
RECIPES = {"SASRec, MovieLens 1M": "ml-1m/sasrec.yaml", "BIGRec, MovieLens 100K": "ml-100k/bigrec.yaml"}
READERS = ("data.batches", "data.item_prompts", "models.losses")  # modules that ask how long a batch is to be


def main() -> None:
    from benchmarks.document import hardware, write_section

    measured = {}
    for name, recipe in RECIPES.items():
        for precision in ("bf16", "fp32"):
            with TemporaryDirectory() as folder:
                measured[f"{name}, {precision}"] = contest(recipe, precision, folder)
    (RESULTS / "shapes.json").write_text(
        json.dumps({"hardware": hardware(), "threads": THREADS, "rounds": measured}, indent=1) + "\n"
    )
    text = markdown(measured, hardware()["device"])
    write_section(ROOT / "docs" / "results.md", COMMAND, text)
    print(text)


def contest(recipe: str, precision: str, folder: str) -> dict[str, list[Round]]:
    flags = [f"--recipe={ROOT / 'launch' / 'recipes' / recipe}", *PLAIN_LOOP, f"--train.precision={precision}"]
    flags += [f"--train.log_every_steps={STEPS}", "--train.save_every_steps=1000000", f"--data.cache={folder}"]
    ways = {
        "few lengths": Contestant([__file__, "worker", *flags, f"--output={folder}/few"]),
        "as long as needed": Contestant([__file__, "worker", "exact", *flags, f"--output={folder}/exact"]),
    }
    rounds = take_turns({name: partial(one.round, STEPS) for name, one in ways.items()}, REPEATS)
    for one in ways.values():
        one.leave()
    return rounds


def train_exactly(*flags: str) -> None:
    """Our own loop, with batches that are as long as their longest row."""
    import importlib

    from benchmarks.training import train

    for module in READERS:
        patch.object(importlib.import_module(module), "padded_length", lambda longest, most=None: longest).start()
    train([*flags], Turns())


def markdown(measured: dict[str, dict[str, list[Round]]], device: str) -> str:
    lines = [
        f"{device}, {which_seconds(THREADS)}; {REPEATS} turns of {STEPS} steps, medians, the ratio within a "
        "turn; memory is the peak at the end.",
        "",
        "| what | as long as needed | few lengths | ratio | memory |",
        "|" + " --- |" * 5,
    ]
    for name, rounds in measured.items():
        few, exact = rounds["few lengths"], rounds["as long as needed"]
        seconds = [statistics.median(played["seconds"] for played in each) for each in (exact, few)]
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(few, exact, strict=True))
        memory = [each[-1]["peak_memory"] / 1e9 for each in (exact, few)]
        cells = [
            f"{seconds[0]:.2f} s",
            f"{seconds[1]:.2f} s",
            f"{ratio:.2f}",
            f"{memory[0]:.1f} and {memory[1]:.1f} GB",
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    take_part(main, {"exact": train_exactly})
