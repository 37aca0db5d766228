"""Forecast what fits one GPU for the shapes in launch/shapes, and how fast: the tables of docs/scaling.md.

python benchmarks/qlora_memory.py

Nothing is trained and no GPU is needed: these are forecasts (see launch/plan.py).
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from benchmarks.document import write_section
from launch.config import RunConfig, parse
from launch.fitting import Planner
from launch.memory import STRATEGIES, GiB, Strategy

COMMAND = "benchmarks/qlora_memory.py"
DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
SHAPES = ("llama-3.1-8b", "qwen2.5-7b")
NUM_ITEMS = 10_000
ALONE, OFFLOADED = STRATEGIES[0], STRATEGIES[-1]
UTILISATION = 0.4  # of a GPU's peak in bfloat16, assumed


def main() -> None:
    tables = (small_cards(), with_and_without_quantisation(), forecast_speeds())
    text = "\n\n".join("\n".join(table) for table in tables)
    write_section(DOCUMENT, COMMAND, text)
    print(text)


def settings(shape: str, quantization: str, checkpointing: bool, micro_batch: int, batch_size: int) -> RunConfig:
    return parse(
        f"--model bigrec --backbone.name launch/shapes/{shape} --backbone.quantization {quantization} "
        f"--backbone.gradient_checkpointing {str(checkpointing).lower()} --train.batch_size {batch_size} "
        f"--train.micro_batch_size {micro_batch}".split()
    )


def rows_that_fit(planner: Planner, strategy: Strategy, memory: int) -> str:
    return str(planner.largest(strategy, memory * GiB, refinements=1) or "none")


def small_cards() -> Iterator[str]:
    """Yield the lines of QLoRA's table."""
    memories = (12, 24)
    yield f"| backbone | checkpointing | tokens a row | {' | '.join(f'rows in {m} GiB' for m in memories)} |"
    yield "| --- | --- | --- | --- | --- |"
    for shape in SHAPES:
        for checkpointing in (False, True):
            config = settings(shape, "4bit", checkpointing, 4, 128)
            for length in (512, 1024, 2048):
                planner = Planner(config, NUM_ITEMS, length, gpus=1)
                fits = [rows_that_fit(planner, ALONE, memory) for memory in memories]
                yield f"| {shape} | {'yes' if checkpointing else 'no'} | {length:,} | {' | '.join(fits)} |"


def with_and_without_quantisation() -> Iterator[str]:
    """Yield the lines of a table of LoRA on three bases: 4 bits, bfloat16, and bfloat16 that waits on the host."""
    memories = (24, 48, 80)
    yield (
        "| backbone | base | tokens a row | GPU, 1 row, GiB | host, GiB | "
        f"{' | '.join(f'rows in {m} GiB' for m in memories)} |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    lengths = (512, 1024)
    for shape in SHAPES:
        planners = {  # kept, since what one has rehearsed serves every strategy and card
            (quantization, length): Planner(settings(shape, quantization, True, 1, 512), NUM_ITEMS, length, gpus=1)
            for quantization in ("4bit", "none")
            for length in lengths
        }
        for base, quantization, strategy in (
            ("4 bits", "4bit", ALONE),
            ("bfloat16", "none", ALONE),
            ("bfloat16, ZeRO-3 with offload", "none", OFFLOADED),
        ):
            for length in lengths:
                planner = planners[quantization, length]
                size = planner.fit(strategy, GiB).forecast
                cells = [f"{size.total / GiB:.1f}", f"{size.host / GiB:.1f}" if size.host else "-"]
                cells += [rows_that_fit(planner, strategy, memory) for memory in memories]
                yield f"| {shape} | {base} | {length:,} | {' | '.join(cells)} |"


def forecast_speeds() -> Iterator[str]:
    """Yield the lines of a table of what one trained token computes, and of tokens/s at an assumed utilisation."""
    gpus = {"peak 165": 165, "peak 989": 989}  # 10^12 FLOP/s; cards of 24 and 80 GiB
    yield f"| backbone | checkpointing | 10^9 FLOP a token | {' | '.join(f'tokens/s, {gpu}' for gpu in gpus)} |"
    yield "| --- | --- | --- |" + " --- |" * len(gpus)
    for shape in SHAPES:
        for checkpointing in (False, True):  # a base of 4 bits takes as many
            planner = Planner(settings(shape, "none", checkpointing, 1, 1), NUM_ITEMS, 512, gpus=1)
            each = planner.rehearsal.flops / planner.length
            speeds = (f"{UTILISATION * peak * 1e12 / each:,.0f}" for peak in gpus.values())
            yield f"| {shape} | {'yes' if checkpointing else 'no'} | {each / 1e9:.1f} | {' | '.join(speeds)} |"


if __name__ == "__main__":
    main()
