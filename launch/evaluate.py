"""Measure a finished run again, on either phase, under any protocol.

accelerate launch launch/evaluate.py --run runs/NAME --protocol sampled-100
accelerate launch launch/evaluate.py --run runs/NAME --protocol candidates-20 --draws 5
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
from evaluation.results import Evaluation, over_draws, write_ranks
from launch import show
from launch.loading import load_run, read_data_of
from launch.measuring import rank, rank_part
from launch.parser import SettingsParser
from launch.setting import CannotRank
from launch.written import mean_over_draws, score_written
from models.rankllm import TooManyFailures
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

    draws: int = 1
    """Candidate sets, drawn with the seeds seed, seed + 1, ...: figures are then means over them, with their spread."""

    def __post_init__(self) -> None:
        if self.draws < 1 or (self.draws > 1 and self.protocol == "full"):
            raise ValueError(f"--draws {self.draws}: expected at least 1, and more only with candidates (--protocol)")
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
    options = {name: getattr(config, name) for name in ("cutoffs", "protocol", "mask", "ties")}
    seeds = range(config.seed, config.seed + config.draws)
    try:
        evaluators = [Evaluator(parts, config.phase, **options, seed=seed) for seed in seeds]
    except ValueError as error:  # users with too few unseen items for the protocol
        sys.exit(f"error: {error}")
    batch_size = config.batch_size or run.config.train.eval_batch_size
    model = runtime.accelerator.prepare_model(run.built.model, evaluation_mode=True)
    writes = run.built.titles is not None and run.config.method.scoring == "generate"
    measured, popularity, written = [], [], []
    of_parts: dict[str, list[Evaluation]] = {name: [] for name in run.built.parts}
    with runtime.watchdog.watching():
        for seed, evaluator in zip(seeds, evaluators, strict=True):
            try:
                examples = run.built.evaluation_among(parts, config.phase, evaluator.candidates)
                batches = EvaluationLoader(examples, batch_size, runtime.share, runtime.device)
                measured.append(rank(run.built, evaluator, model, runtime.watchdog.each(batches)))
                for name, found in of_parts.items():
                    found.append(rank_part(run.built, name, evaluator, model, runtime.watchdog.each(batches)))
            except (CannotRank, TooManyFailures) as error:
                sys.exit(f"error: --run {config.run}: {error}")
            if writes:
                each, targets = runtime.watchdog.each(batches), parts.target_items(config.phase)
                written.append(score_written(run.built, model.eval(), each, targets))
            popularity.append(evaluate_popularity(parts, config.phase, **options, seed=seed))
    if runtime.is_main:
        write(config, run.config.model, measured, popularity, mean_over_draws(written) if written else None, of_parts)
    runtime.close()
    return 0


def write(
    config: EvaluateConfig,
    model: str,
    measured: list[Evaluation],
    popularity: list[Evaluation],
    written: dict[str, dict[str, float]] | None,
    of_parts: dict[str, list[Evaluation]],
) -> None:
    """Write ranks and figures to the run folder, and show the figures.

    `written` are those of generated text, `of_parts` those of parts of the model alone.
    """
    name = f"{config.phase}-{config.protocol}-{config.mask}-{config.ties}"
    folder = config.run / "evaluations"
    for evaluation in measured:
        seed = f"-seed{evaluation.header['seed']}" if config.draws > 1 else ""
        write_ranks(evaluation, folder / f"{name}{seed}.parquet")
    title = (
        f"{measured[0].header['dataset']}, {config.phase}, {config.protocol}, mask {config.mask}, ties {config.ties}"
    )
    if config.draws == 1:
        figures, baseline = measured[0].as_results(), popularity[0].as_results()
        alone = {name: found[0].as_results() for name, found in of_parts.items()}
        table = show.figures(title, model, figures, baseline, alone)
    else:
        name += f"-{config.draws}-draws"
        figures, baseline = over_draws(measured), over_draws(popularity)
        table = show.figures_of_draws(f"{title}, {config.draws} draws", model, figures, baseline)
    results = {"model": model, **figures, "popularity": baseline} | ({"written": written} if written else {})
    if of_parts:
        results["parts"] = {
            name: found[0].as_results() if config.draws == 1 else over_draws(found) for name, found in of_parts.items()
        }
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1))
    Console(highlight=False).print(table)
    for rule, shares in (written or {}).items():
        print(f"texts, {rule} rule: " + ", ".join(f"{name} {share:.4f}" for name, share in shares.items()))
    print(f"written to {folder / name}.json")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
