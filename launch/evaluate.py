"""Measure a finished run again, on either phase, under any protocol.

accelerate launch launch/evaluate.py --run runs/NAME --protocol sampled-100
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from rich.console import Console

from data.loaders import EvaluationLoader
from evaluation.config import EvaluationConfig
from evaluation.evaluator import Evaluator, evaluate_popularity
from evaluation.results import write_ranks
from launch.loading import load_run, read_data_of
from launch.parser import SettingsParser
from launch.show import figures
from trainers.runtime import Runtime, leave


@dataclass(kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """What to measure."""

    run: Path
    """Run folder."""
    phase: Literal["valid", "test"] = "test"
    """Which held-out events to ask for."""
    batch_size: int | None = None
    """Users of one pass on one process, the run's own when not given."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """Autocast type of the model, the run's own when not given; scores are always ranked in float32."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: expected at least 1")
        if not self.cutoffs or min(self.cutoffs) < 1:
            raise ValueError(f"--cutoffs {[*self.cutoffs]}: expected at least one, each at least 1")


def main(argv: list[str]) -> int:
    parser = SettingsParser(prog="launch/evaluate.py", description=__doc__)
    config = parser.read_as(EvaluateConfig, argv)
    run = load_run(config.run)
    runtime = Runtime(config.precision or run.config.train.precision, timeout_seconds=run.config.train.timeout_seconds)
    parts = read_data_of(run)
    options = {name: getattr(config, name) for name in ("cutoffs", "protocol", "mask", "ties", "seed")}
    try:
        evaluator = Evaluator(parts, config.phase, **options)
    except ValueError as error:  # users with too few unseen items for the protocol
        sys.exit(f"error: {error}")
    batch_size = config.batch_size or run.config.train.eval_batch_size
    batches = EvaluationLoader(run.built.evaluation(parts, config.phase), batch_size, runtime.share, runtime.device)
    model = runtime.accelerator.prepare_model(run.built.model, evaluation_mode=True)
    with runtime.watchdog.watching():
        result = evaluator.run(model, runtime.watchdog.each(batches))
        popularity = evaluate_popularity(parts, config.phase, **options)
    if runtime.is_main:
        name = f"{config.phase}-{config.protocol}-{config.mask}-{config.ties}"
        folder = config.run / "evaluations"
        write_ranks(result, folder / f"{name}.parquet")
        measured, baseline = result.as_results(), popularity.as_results()
        written = {"model": run.config.model, **measured, "popularity": baseline}
        (folder / f"{name}.json").write_text(json.dumps(written, indent=1))
        title = f"{parts.name}, {config.phase}, {config.protocol}, mask {config.mask}, ties {config.ties}"
        Console(highlight=False).print(figures(title, run.config.model, measured, baseline))
        print(f"written to {folder / name}.json")
    runtime.close()
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
