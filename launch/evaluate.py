"""Measure a finished run again, on either phase, under any protocol.

accelerate launch launch/evaluate.py --run runs/NAME --protocol sampled-100
accelerate launch launch/evaluate.py --run runs/NAME --protocol candidates-20 --draws 5
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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


@dataclass
class Measured:
    """What was found, an entry a draw of candidates."""

    parts: dict[str, list[Evaluation]]  # of the model alone, where the method has any
    ranked: list[Evaluation] = field(default_factory=list)
    popularity: list[Evaluation] = field(default_factory=list)
    written: list[dict[str, dict[str, float]]] = field(default_factory=list)  # of generated text
    stages: dict[str, Any] | None = None  # what a ranking of retrieved candidates means


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
    found = Measured(parts={name: [] for name in run.built.parts})
    with runtime.watchdog.watching():
        for seed, evaluator in zip(seeds, evaluators, strict=True):
            try:
                examples = run.built.evaluation_among(parts, config.phase, evaluator.candidates)
                batches = EvaluationLoader(examples, batch_size, runtime.share, runtime.device)
                found.ranked.append(rank(run.built, evaluator, model, runtime.watchdog.each(batches)))
                for name, alone in found.parts.items():
                    alone.append(rank_part(run.built, name, evaluator, model, runtime.watchdog.each(batches)))
            except (CannotRank, TooManyFailures) as error:
                sys.exit(f"error: --run {config.run}: {error}")
            if writes:
                each, targets = runtime.watchdog.each(batches), parts.target_items(config.phase)
                found.written.append(score_written(run.built, model.eval(), each, targets))
            found.popularity.append(evaluate_popularity(parts, config.phase, **options, seed=seed))
        if run.built.summary is not None and config.protocol == "full":
            found.stages = run.built.summary(parts, found.ranked[0])
    if runtime.is_main:
        write(config, run.config.model, found)
    runtime.close()
    return 0


def write(config: EvaluateConfig, model: str, found: Measured) -> None:
    """Write ranks and figures to the run folder, and show the figures."""
    name = f"{config.phase}-{config.protocol}-{config.mask}-{config.ties}"
    folder, header = config.run / "evaluations", found.ranked[0].header
    for evaluation in found.ranked:
        seed = f"-seed{evaluation.header['seed']}" if config.draws > 1 else ""
        write_ranks(evaluation, folder / f"{name}{seed}.parquet")
    title = f"{header['dataset']}, {config.phase}, {config.protocol}, mask {config.mask}, ties {config.ties}"
    figures, baseline = in_short(found.ranked), in_short(found.popularity)
    alone = {part: in_short(evaluations) for part, evaluations in found.parts.items()}
    if config.draws == 1:
        table = show.figures(title, model, figures, baseline, alone)
    else:
        name += f"-{config.draws}-draws"
        table = show.figures_of_draws(f"{title}, {config.draws} draws", model, figures, baseline)
    written = mean_over_draws(found.written) if found.written else {}
    more = {"parts": alone, "two_stages": found.stages, "written": written}
    results = {"model": model, **figures, "popularity": baseline} | {key: value for key, value in more.items() if value}
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1))
    console = Console(highlight=False)
    console.print(table)
    if found.stages is not None:
        console.print(show.stages(found.stages, figures))
    for rule, shares in written.items():
        print(f"texts, {rule} rule: " + ", ".join(f"{name} {share:.4f}" for name, share in shares.items()))
    print(f"written to {folder / name}.json")


def in_short(evaluations: list[Evaluation]) -> dict[str, Any]:
    """The figures of the only draw, or means over several with their spread."""
    return evaluations[0].as_results() if len(evaluations) == 1 else over_draws(evaluations)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
