"""Forecast the memory of a training run on GPUs that need not be here: what fits, what to pick, and the command.

python launch/plan.py --backbone.name FOLDER_OR_HUB_ID --backbone.quantization 4bit --gpus 4 --gpu_memory 24

Takes the flags of launch/train.py beside its own. Reads the backbone's config.json and nothing else.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data.item_prompts import ItemPromptSettings
from launch.config import RunConfig, parse_with
from launch.fitting import Fit, Planner
from launch.memory import RESERVED, GiB
from launch.rehearsal import require_forecast
from models.dllm2rec import DLLM2RecConfig
from models.sasrec import SASRecConfig
from models.ur4rec.reranking import UR4RecConfig, UR4RecPretrainConfig
from models.ur4rec.v2_config import UR4RecV2Config

PAGE_WIDTH = 120  # where there is no terminal to ask


@dataclass
class PlanSettings:
    """The hardware, and the sizes that a run would read from the data."""

    gpus: int = 1
    """GPUs of one machine."""
    gpu_memory: float = 24.0
    """Memory of each GPU in GiB."""
    length: int | None = None
    """Tokens of a row, or events of a history; the longest that the method's settings allow when not given."""
    num_items: int = 10_000
    """Items of the catalogue."""
    gpu_tflops: float | None = None
    """Peak of each GPU for the training's type, in 10^12 FLOP/s, as its data sheet has it without sparsity; forecasts
    the speed too."""
    utilisation: float = 0.4
    """Share of that peak which training is taken to reach."""
    json: bool = False
    """Print JSON (sizes in bytes) instead of a table."""

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "num_items", "length", "gpu_tflops"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} is {value}, but must be above 0")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation is {self.utilisation}, but must be above 0 and at most 1")


def main(argv: list[str]) -> int:
    """Return the exit code: 0 when some strategy fits, 1 when none does."""
    config, settings = parse_with(PlanSettings, argv)
    try:
        require_forecast(config)
        planner = Planner(config, settings.num_items, settings.length or longest(config), settings.gpus)
        fits = planner.fits(int(settings.gpu_memory * GiB))
    except ValueError as error:
        sys.exit(f"error: {error}")
    pick = next((fit for fit in fits if fit.fits), None) or next((fit for fit in fits if fit.largest_micro_batch), None)
    command = None if pick is None else planner.command(pick, train_flags(argv, pick.fits))
    if settings.json:
        print(json.dumps(as_json(planner, settings, fits, pick, command), indent=2))
    else:
        show(planner, settings, fits, pick, command)
    return 0 if pick else 1


def longest(config: RunConfig) -> int:
    """Return the longest row that a method's settings allow: tokens of a prompt, or events of a history."""
    if isinstance(config.method, UR4RecConfig | UR4RecPretrainConfig):
        return config.method.history_length
    prompts = getattr(config.method, "prompts", getattr(config.method, "texts", None))
    if isinstance(prompts, ItemPromptSettings):
        return prompts.max_history
    if prompts is not None:
        return prompts.max_length
    if isinstance(config.method, UR4RecV2Config):
        return SASRecConfig().window
    return (config.method.student if isinstance(config.method, DLLM2RecConfig) else config.method).window


def show(planner: Planner, settings: PlanSettings, fits: list[Fit], pick: Fit | None, command: str | None) -> None:
    """Print the forecast for people."""
    size, console = planner.rehearsal, Console(highlight=False)
    if not console.is_terminal:
        console.width = PAGE_WIDTH
    rows = f"{planner.micro_batch} x {planner.length:,} {'tokens' if planner.config.backbone else 'events'}"
    print(
        f"{planner.config.model}: {size.parameters:,} parameters, {size.trainable_parameters:,} trainable; "
        f"a micro-batch of {rows} on each of {settings.gpus} x {settings.gpu_memory:g} GiB"
    )
    console.print(forecast_table(fits))
    print(
        f"Forecasts in GiB a GPU, {RESERVED / GiB:g} GiB for CUDA in the total; host: what waits there, for all GPUs;\n"
        "largest: rows of a micro-batch that fit. Evaluation, data and loading the weights are not counted."
    )
    print(work(planner, settings))
    if size.left_out:
        print(f"Not counted either: {size.left_out}.")
    if pick is None:
        print(f"Nothing fits, not even one row of {planner.length:,}. What would fit:")
        remedies = planner.remedies(int(settings.gpu_memory * GiB))
        print(
            "\n".join(f"  {remedy}" for remedy in remedies) or "  nothing that is known here: a smaller --backbone.name"
        )
        return
    less = "" if pick.fits else f" with a micro-batch of {planner.even(pick.largest_micro_batch)}"
    print(f"Pick {pick.forecast.strategy.title_for(settings.gpus)}{less}:\n  {command}")


def work(planner: Planner, settings: PlanSettings) -> str:
    """Return in words how much is computed, and how long that would take."""
    places, each = planner.micro_batch * planner.length, "token" if planner.config.backbone else "event"
    words = f"One {each} of a training step: {planner.rehearsal.flops / places / 1e9:,.4g} x 10^9 FLOP."
    if settings.gpu_tflops is None:
        return words
    speed = places_per_second(planner, settings)
    return (
        f"{words} At {settings.utilisation:.0%} of {settings.gpu_tflops:g} x 10^12 FLOP/s, {speed:,.0f} {each}s/s a "
        f"GPU and {planner.share * planner.length / speed:,.3g} s a step, with nothing for communication and offload."
    )


def places_per_second(planner: Planner, settings: PlanSettings) -> float:
    """Return the tokens (or events) that one GPU trains in a second, padding included."""
    assert settings.gpu_tflops is not None
    each = planner.rehearsal.flops / (planner.micro_batch * planner.length)
    return settings.gpu_tflops * 1e12 * settings.utilisation / each


def forecast_table(fits: list[Fit]) -> Table:
    """Return a row a strategy: GiB by what they hold, and the largest micro-batch that fits."""
    table = Table(box=SIMPLE_HEAD)
    columns = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "total", "host")
    for heading in ("", *columns, "fits", "largest"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for fit in fits:
        sizes = [f"{getattr(fit.forecast, column) / GiB:.2f}" for column in columns]
        table.add_row(fit.title, *sizes, "yes" if fit.fits else "no", str(fit.largest_micro_batch))
    return table


def train_flags(argv: list[str], keeps_micro_batch: bool) -> list[str]:
    """Return a command line without the flags that launch/train.py does not know, or that will be set anew."""
    own = {f"--{field.name}" for field in fields(PlanSettings)}
    if not keeps_micro_batch:
        own.add("--train.micro_batch_size")
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag not in own:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def as_json(
    planner: Planner, settings: PlanSettings, fits: list[Fit], pick: Fit | None, command: str | None
) -> dict[str, Any]:
    """Return the forecast for machines; sizes in bytes."""
    strategies = [
        {"name": fit.forecast.strategy.name, "fits": fit.fits, "largest_micro_batch": fit.largest_micro_batch}
        | {name: size for name, size in asdict(fit.forecast).items() if name != "strategy"}
        | {"total": fit.forecast.total}
        for fit in fits
    ]
    return {
        "forecast": True,
        "micro_batch": planner.micro_batch,
        "length": planner.length,
        "micro_batch_of_one_process": asdict(planner.rehearsal),
        "strategies": strategies,
        "pick": None if pick is None else pick.forecast.strategy.name,
        "command": command,
        "tokens_per_second_of_a_gpu": None if settings.gpu_tflops is None else places_per_second(planner, settings),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
