"""The end of a run: its best weights measured on validation and test, beside popularity, and written down."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from data.batches import Examples
from data.interactions import Catalog
from data.loaders import EvaluationLoader, TrainingLoader
from data.splits import Phase, Split
from evaluation.evaluator import Evaluator, evaluate_popularity
from evaluation.held_out import held_out_loss
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

KEPT = 10  # recommendations of each user, for coverage and for display
PHASES: tuple[Phase, Phase] = ("valid", "test")


@dataclass
class Clock:
    """When this start of a run began, and when its first batch was ready."""

    started: float
    first_batch: float = 0.0

    def timing(self, progress: Progress, evaluation_seconds: float) -> dict[str, float]:
        """Return seconds: until the first batch, training over all starts, this start in all, one evaluation."""
        return {
            "start_seconds": round(self.first_batch - self.started, 2),
            "train_seconds": round(progress.seconds, 2),
            "total_seconds": round(time.perf_counter() - self.started, 2),
            "evaluation_seconds": round(evaluation_seconds, 3),
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
    runtime.settle()
    if trained.best is not None:
        restore_weights_of_main(trained.best, model, runtime.is_main)
    if built.calibrate is not None:
        batches = evaluation_batches(config, built, parts, "valid", runtime)
        built.calibrate(trained.model, batches, parts.target_items("valid"))
    figures: dict[str, Any]
    evaluations: list[Evaluation] = []
    began = time.perf_counter()
    if built.held_out is not None:
        figures = {"valid": measure_held_out(config, built.held_out(), trained.model, runtime)}
        seconds = time.perf_counter() - began
    else:
        figures, evaluations = measure_ranking(config, built, trained.model, parts, catalog, runtime)
        seconds = evaluations[-1].header["seconds"]
    runtime.settle()
    weights, size = weights_of(model, keep=runtime.is_main), describe(model)
    if not runtime.is_main:
        return
    saved = config
    if built.distilled is not None:  # what recommends is the student
        saved = replace(config, model=built.distilled.name, method=built.distilled.method)
        weights = built.distilled.plain_weights(weights)
        served = sum(weight.numel() for weight in weights.values())
        size |= {"parameters": served, "trainable_parameters": served}
    folder.save_model(saved, weights, catalog, built.tokenizer)
    for evaluation in evaluations:
        write_ranks(evaluation, folder.ranks(evaluation.header["phase"]))
    results = {
        "model": config.model,
        "dataset": parts.name,
        "split": {"kind": parts.kind, "hash": parts.hash, "users": parts.num_users, "items": parts.num_items},
        "text_hash": catalog.text_hash,
        **figures,
        "parameters": {"total": size["parameters"], "trainable": size["trainable_parameters"]},
        "training": {"steps": trained.progress.step, "best_step": trained.progress.best_step},
        "timing": clock.timing(trained.progress, seconds),
    }
    folder.write_results(results)


def measure_ranking(
    config: RunConfig, built: Built, model: nn.Module, parts: Split, catalog: Catalog, runtime: Runtime
) -> tuple[dict[str, Any], list[Evaluation]]:
    """Rank the targets of both phases; return what results.json says of them, and the evaluations, test last."""
    protocol = config.evaluation.protocol
    top_k = KEPT if built.distilled is None else built.distilled.top_k
    valid, test = (evaluate(config, built, model, parts, phase, runtime, protocol, top_k) for phase in PHASES)
    popularity = evaluate_popularity(parts, "test", **evaluator_options(config, protocol))
    figures = {
        "header": test.header,
        "valid": valid.as_results(),
        "test": test.as_results(),
        "popularity": popularity.as_results(),
        "examples": example_recommendations(test, parts, catalog),
    }
    if built.summary is not None and config.evaluation.protocol == "full":
        figures["two_stages"] = {
            evaluation.header["phase"]: built.summary(parts, evaluation) for evaluation in (valid, test)
        }
    if built.parts:
        figures["parts"] = {
            name: measure_part(config, built, name, model, parts, runtime, protocol) for name in built.parts
        }
    if built.distilled is not None and built.distilled.compare is not None and config.evaluation.protocol == "full":
        figures["teacher"] = built.distilled.compare(valid)
    return figures, [valid, test]


def measure_part(
    config: RunConfig, built: Built, name: str, model: nn.Module, parts: Split, runtime: Runtime, protocol: Protocol
) -> dict[str, Any]:
    """Return the figures of both phases of one part of a model alone (see `Built.parts`)."""
    return {
        phase: rank_part(
            built,
            name,
            Evaluator(parts, phase, **evaluator_options(config, protocol)),
            model,
            evaluation_batches(config, built, parts, phase, runtime),
        ).as_results()
        for phase in PHASES
    }


def rank_part(built: Built, name: str, evaluator: Evaluator, model: nn.Module, batches: Iterable[Any]) -> Evaluation:
    """Rank with one part of a method's model alone."""
    model.eval()
    return evaluator.run(lambda batch: model(batch, built.parts[name]), batches)


def measure_held_out(config: RunConfig, examples: Examples, model: nn.Module, runtime: Runtime) -> dict[str, float]:
    """Return a stage's loss and its parts on the examples that it holds out."""
    # All of them as one step of training: every process makes as many passes, and no example counts twice.
    size = config.train.eval_batch_size
    loader = TrainingLoader(examples, len(examples.lengths), size, runtime.share, config.train.seed)
    (step,) = loader.epoch(0)
    runtime.watchdog.arrive("the loss on what is held out")
    batches = (batch.to(runtime.device) for batch in runtime.watchdog.each(step.batches))
    return held_out_loss(model, batches, config.train.seed)


def evaluate(
    config: RunConfig,
    built: Built,
    model: nn.Module,
    parts: Split,
    phase: Phase,
    runtime: Runtime,
    protocol: Protocol = "full",
    top_k: int = KEPT,
) -> Evaluation:
    """Rank every target of a phase, and keep the `top_k` best items for each."""
    evaluator = Evaluator(parts, phase, **evaluator_options(config, protocol), top_k=top_k)
    runtime.watchdog.arrive(f"the evaluation on {phase} targets")
    return rank(built, evaluator, model, evaluation_batches(config, built, parts, phase, runtime, evaluator.candidates))


def rank(built: Built, evaluator: Evaluator, model: nn.Module, batches: Iterable[Any]) -> Evaluation:
    """Rank with a method, whose own figures of the scoring go into the header."""
    evaluation = evaluator.run(model, batches)
    if built.scoring_figures is not None:
        evaluation.header["scoring"] = built.scoring_figures()
    return evaluation


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
