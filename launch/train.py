"""Train a recommender, rank the whole catalogue for every test user, and leave a run folder.

accelerate launch launch/train.py --model bigrec
"""

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from accelerate.utils import set_seed
from rich.console import Console
from rich.logging import RichHandler

from data.interactions import Catalog
from data.loaders import TrainingLoader
from data.splits import Split
from evaluation.protocols import NotEnoughItems, draw_candidates, metric_prefix
from launch.config import RunConfig, dump, parse
from launch.loading import read_and_split, setting_of
from launch.measuring import Clock, Trained, evaluate, finish, measure_held_out, selection_protocol
from launch.methods import METHODS, Built
from launch.out_of_memory import explain, is_out_of_memory
from launch.run_folder import RunFolder
from launch.show import show_results
from models.backbone import describe
from models.rankllm import TooManyFailures
from trainers.checkpoint import (
    CannotSave,
    Checkpoints,
    CorruptCheckpoint,
    restore_optimizer,
    restore_weights,
)
from trainers.loop import NonFiniteLoss, Trainer
from trainers.optimizer import build_optimizer
from trainers.progress import Progress
from trainers.runtime import Runtime, leave
from trainers.signals import Interrupted, Stop
from trainers.tracking import Tracking

logger = logging.getLogger("shardrec")


def main(argv: list[str]) -> int:
    """Return the exit code: 0, 1 when the loss was not finite, 128 + n when signal n stopped the run and it has saved.

    A run that loses one of its processes ends with 75 (see trainers/watchdog.py).
    """
    try:
        with Stop() as stop:
            run(parse(argv), stop)
    except Interrupted as interruption:
        logger.warning("%s; the same command goes on from the last checkpoint", interruption)
        return interruption.exit_code
    except NonFiniteLoss as error:
        logger.error("%s", error)
        return 1
    except (CannotSave, CorruptCheckpoint, NotEnoughItems, TooManyFailures) as error:
        sys.exit(f"error: {error}")
    return 0


def run(config: RunConfig, stop: Stop) -> None:
    """Train, evaluate and show the results; a signal may leave it anywhere (see trainers/signals.py)."""
    clock = Clock(time.perf_counter())
    runtime = Runtime(config.train.precision, config.train.trackers, config.output, config.train.timeout_seconds)
    set_up_logging(runtime)
    with runtime.watchdog.watching():
        train_and_measure(config, runtime, stop, clock)


def train_and_measure(config: RunConfig, runtime: Runtime, stop: Stop, clock: Clock) -> None:
    """The run itself, watched over (see trainers/watchdog.py)."""
    folder = RunFolder(config.output)
    if config.resume == "auto" and folder.is_finished(config):
        if runtime.is_main:
            logger.info("%s is finished: showing its results (another --output trains anew)", config.output)
            show_results(folder)
        return

    catalog, parts = load_data(config, runtime)
    if config.evaluation.protocol != "full":
        draw_candidates(parts, "test", config.evaluation.protocol, config.evaluation.seed)  # fails now or never
    set_seed(config.train.seed)
    try:
        built = build(config, catalog, parts, runtime)
        if config.evaluation.protocol == "full" and built.held_out is None:
            built.require_full_ranking()
        if runtime.is_main:
            folder.begin(config, runtime)
        runtime.wait()
        if config.train.max_steps == 0 or not any(p.requires_grad for p in built.model.parameters()):
            measure_as_it_is(config, built, catalog, parts, runtime, folder, clock)
            return
        trainer = make_trainer(config, built, parts, runtime, folder, stop)
    except ValueError as error:  # settings that do not go together, or not with this backbone or checkpoint
        raise SystemExit(f"error: {error}" if runtime.is_main else 1) from error
    clock.first_batch = time.perf_counter()
    logger.info("ready for the first batch after %.1f s", clock.first_batch - clock.started)
    try:
        with trainer.tracking:
            trainer.train()
        finish(config, built, Trained.by(trainer), runtime, parts, catalog, folder, clock)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        longest = int(trainer.loader.examples.lengths.max())
        raise SystemExit(f"error: {explain(error, config, runtime, parts.num_items, longest)}") from error
    if runtime.is_main:
        show_results(folder)
    runtime.close()


def measure_as_it_is(
    config: RunConfig,
    built: Built,
    catalog: Catalog,
    parts: Split,
    runtime: Runtime,
    folder: RunFolder,
    clock: Clock,
) -> None:
    """Finish a run that trains nothing."""
    clock.first_batch = time.perf_counter()
    logger.info("%s is not trained: it is measured as it is, %s", config.model, runtime.strategy)
    model = runtime.accelerator.prepare_model(built.model, evaluation_mode=True)
    finish(config, built, Trained(model, Progress()), runtime, parts, catalog, folder, clock)
    if runtime.is_main:
        show_results(folder)
    runtime.close()


def load_data(config: RunConfig, runtime: Runtime) -> tuple[Catalog, Split]:
    """Read and split; with several processes the first one downloads while the others wait."""
    with runtime.accelerator.local_main_process_first():
        catalog, parts = read_and_split(config.data)
    logger.info(
        "%s: %d users, %d items, %d events; split %s %s, item texts %s",
        *(parts.name, parts.num_users, parts.num_items, len(parts.items), parts.kind, parts.hash[:12]),
        catalog.text_hash[:12],
    )
    return catalog, parts


def build(config: RunConfig, catalog: Catalog, parts: Split, runtime: Runtime) -> Built:
    """Build the model and its examples as the method's row in launch/methods.py says."""
    setting = setting_of(config, parts, catalog, is_main=runtime.is_main)
    return METHODS[config.model].build(setting)


def make_trainer(
    config: RunConfig, built: Built, parts: Split, runtime: Runtime, folder: RunFolder, stop: Stop
) -> Trainer:
    """Bring model, optimizer, loader and the state of an earlier start together."""
    train = config.train
    examples = built.training()
    loader = TrainingLoader(
        examples, train.batch_size, train.micro_batch_size, runtime.share, train.seed, train.group_by_length
    )
    checkpoints = Checkpoints(folder.checkpoints, train.keep_checkpoints)
    model = runtime.place(built.model)
    progress = Progress()
    if (checkpoint := find_checkpoint(config, checkpoints)) is not None:
        progress = restore_weights(checkpoint, model)
        if progress.best_step is not None and not checkpoints.at(progress.best_step).is_dir():
            progress.forget_best()
        logger.info("resuming %s at step %d", checkpoint, progress.step)
    prepared, optimizer = runtime.prepare(
        model, build_optimizer(model, train), loader.micro_batch_size, train.max_grad_norm
    )
    if checkpoint is not None:
        restore_optimizer(checkpoint, model, optimizer, runtime.scaler, runtime.zero)
    runtime.wait()  # every process has read what the main one may now remove
    if runtime.is_main:
        checkpoints.go_on_from(checkpoint, progress)
    total_steps = train.max_steps or train.epochs * loader.steps_per_epoch
    tracking = Tracking(runtime, folder.path, total_steps, dump(config), progress)
    logger.info(
        "%s: %s trainable parameters; %d examples, %d steps an epoch, %s, %s",
        *(config.model, f"{describe(model)['trainable_parameters']:,}", len(examples.lengths)),
        *(loader.steps_per_epoch, runtime.precision, runtime.strategy),
    )

    if built.held_out is None:
        protocol = selection_protocol(config, built)
        train = replace(train, metric=metric_prefix(protocol) + train.metric)

    def validate() -> dict[str, float]:
        if built.held_out is not None:
            return measure_held_out(config, built.held_out(), prepared, runtime)
        return evaluate(config, built, prepared, parts, "valid", runtime, protocol).metrics

    own = checkpoint is not None and checkpoint.resolve() == checkpoints.at(progress.step).resolve()
    return Trainer(
        *(runtime, prepared, optimizer, loader, validate, tracking),
        *(checkpoints, progress, train, folder.path, stop),
        saved_step=progress.step if own else None,
    )


def find_checkpoint(config: RunConfig, checkpoints: Checkpoints) -> Path | None:
    """Return the checkpoint to go on from: the run's own newest for `auto`, or the folder that was named."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return checkpoints.latest()
    return Path(config.resume)


def set_up_logging(runtime: Runtime) -> None:
    """Send log lines of the main process to the console; a terminal gets rich formatting."""
    level = logging.INFO if runtime.is_main else logging.ERROR
    console = Console()
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.setLevel(level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if runtime.is_main else "false")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
