"""The end of a run: its best weights measured on validation and test, beside popularity, and written down."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from data.interactions import Catalog
from data.loaders import EvaluationLoader
from data.splits import Phase, Split
from evaluation.evaluator import Evaluator, evaluate_popularity
from evaluation.protocols import Protocol
from evaluation.results import Evaluation, write_ranks
from models.backbone import describe
from trainers.checkpoint import restore_weights_of_main
from trainers.loop import Trainer
from trainers.progress import Progress
from trainers.runtime import Runtime
from trainers.state import weights_of

from .config import RunConfig
from .methods import Built
from .run_folder import RunFolder
from .show import example_recommendations

PHASES: tuple[Phase, Phase] = ("valid", "test")


@dataclass
class Clock:
    """When this start of a run began, and when its first batch was ready."""

    started: float
    first_batch: float = 0.0

    def timing(self, progress: Progress, test: Evaluation) -> dict[str, float]:
        """Return seconds: until the first batch, training over all starts, this start in all, one evaluation."""
        return {
            "start_seconds": round(self.first_batch - self.started, 2),
            "train_seconds": round(progress.seconds, 2),
            "total_seconds": round(time.perf_counter() - self.started, 2),
            "evaluation_seconds": test.header["seconds"],
        }


@dataclass(frozen=True)
class Trained:
    """A prepared model, how far it was trained, and the checkpoint of its best weights (None: those that it has)."""

    model: nn.Module
    progress: Progress
    best: Path | None = None

    @classmethod
    def by(cls, trainer: Trainer) -> "Trained":
        """What a trainer leaves."""
        step = trainer.progress.best_step
        return cls(trainer.model, trainer.progress, None if step is None else trainer.checkpoints.at(step))


def finish(
    config: RunConfig,
    built: Built,
    trained: Trained,
    runtime: Runtime,
    parts: Split,
    catalog: Catalog,
    folder: RunFolder,
    clock: Clock,
) -> None:
    """Measure the best checkpoint on validation and test, beside popularity; write the model and its results."""
    model = runtime.unwrap(trained.model)
    if trained.best is not None:
        restore_weights_of_main(trained.best, model, runtime.is_main)
    if built.calibrate is not None:
        batches = evaluation_batches(config, built, parts, "valid", runtime)
        built.calibrate(trained.model, batches, parts.target_items("valid"))
    valid, test = (
        evaluate(config, built, trained.model, parts, phase, runtime, config.evaluation.protocol) for phase in PHASES
    )
    popularity = evaluate_popularity(parts, "test", **evaluator_options(config, config.evaluation.protocol))
    weights, size = weights_of(model), describe(model)
    if not runtime.is_main:
        return
    folder.save_model(config, weights, catalog, built.tokenizer)
    for evaluation in (valid, test):
        write_ranks(evaluation, folder.ranks(evaluation.header["phase"]))
    results = {
        "model": config.model,
        "dataset": parts.name,
        "split": {"kind": parts.kind, "hash": parts.hash, "users": parts.num_users, "items": parts.num_items},
        "header": test.header,
        "valid": valid.as_results(),
        "test": test.as_results(),
        "popularity": popularity.as_results(),
        "examples": example_recommendations(test, parts, catalog),
        "parameters": {"total": size["parameters"], "trainable": size["trainable_parameters"]},
        "training": {"steps": trained.progress.step, "best_step": trained.progress.best_step},
        "timing": clock.timing(trained.progress, test),
    }
    folder.write_results(results)


def evaluate(
    config: RunConfig,
    built: Built,
    model: nn.Module,
    parts: Split,
    phase: Phase,
    runtime: Runtime,
    protocol: Protocol = "full",
) -> Evaluation:
    """Rank every target of a phase."""
    evaluator = Evaluator(parts, phase, **evaluator_options(config, protocol))
    runtime.watchdog.arrive(f"the evaluation on {phase} targets")
    return evaluator.run(model, evaluation_batches(config, built, parts, phase, runtime, evaluator.candidates))


def selection_protocol(config: RunConfig, built: Built) -> Protocol:
    """By what the best checkpoint is chosen: the full catalogue, unless the model only ranks candidates."""
    return "full" if built.evaluation is not None else config.evaluation.protocol


def evaluator_options(config: RunConfig, protocol: Protocol) -> dict[str, Any]:
    """Return the evaluator's settings under a protocol."""
    return vars(config.evaluation) | {"protocol": protocol}


def evaluation_batches(
    config: RunConfig,
    built: Built,
    parts: Split,
    phase: Phase,
    runtime: Runtime,
    candidates: np.ndarray | None = None,
) -> Iterator[Any]:
    """Yield this process's batches of a phase."""
    examples = built.evaluation_among(parts, phase, candidates)
    loader = EvaluationLoader(examples, config.train.eval_batch_size, runtime.share, runtime.device)
    return runtime.watchdog.each(loader)
