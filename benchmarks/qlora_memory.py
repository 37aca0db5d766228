"""Forecast which micro-batches of QLoRA fit one GPU, for the shapes in launch/shapes: the table of docs/scaling.md.

python benchmarks/qlora_memory.py

Nothing is trained and no GPU is needed: these are forecasts (see launch/plan.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from launch.config import parse
from launch.fitting import Planner
from launch.memory import STRATEGIES, GiB

SHAPES = ("llama-3.1-8b", "qwen2.5-7b")
LENGTHS = (512, 1024, 2048)
GPU_MEMORY = (12, 24)  # GiB
ROWS = 4  # tried first
NUM_ITEMS = 10_000


def main() -> None:
    print("| backbone | checkpointing | tokens a row | rows in 12 GiB | rows in 24 GiB |")
    print("| --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        for checkpointing in ("false", "true"):
            config = parse(
                f"--model bigrec --backbone.name launch/shapes/{shape} --backbone.quantization 4bit "
                f"--backbone.gradient_checkpointing {checkpointing} --train.batch_size 128 "
                f"--train.micro_batch_size {ROWS}".split()
            )
            for length in LENGTHS:
                planner = Planner(config, NUM_ITEMS, length, gpus=1)
                fits = [planner.largest(STRATEGIES[0], memory * GiB, refinements=1) for memory in GPU_MEMORY]
                cells = [str(rows) if rows else "none" for rows in fits]
                used = "yes" if checkpointing == "true" else "no"
                print(f"| {shape} | {used} | {length:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
