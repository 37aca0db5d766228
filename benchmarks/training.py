"""The project's own training loop as a contestant, and what it trains on for peers."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.contest import Turns
from data.loaders import Step, TrainingLoader
from launch import loading
from launch.config import parse
from launch.loading import read_and_split
from launch.run_folder import RunFolder
from launch.setting import Setting
from launch.train import Runtime, Stop, build, load_data, make_trainer, set_up_logging
from trainers.loop import Trainer


class TurnsLoader(TrainingLoader):
    """A loader that hands out a step only when it is this contestant's turn."""

    def __init__(self, loader: TrainingLoader, turns: Turns, metrics: Path) -> None:
        vars(self).update(vars(loader))
        self.turns, self.metrics, self.labels = turns, metrics, 0

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Step]:
        for step in super().epoch(epoch, first_step):
            self.turns.step(self._report)
            self.labels += sum(batch.count for batch in step.batches)
            yield step

    def _report(self) -> dict[str, float]:
        """The labels of the round that has ended, and the last logged line, whose means are over the same steps."""
        line = json.loads(self.metrics.read_text().splitlines()[-1])
        labels, self.labels = self.labels, 0
        return {"loss": line["loss"], "labels": labels}


def train(argv: list[str], turns: Turns) -> None:
    """Train as launch/train.py does, a round at a time; never returns."""
    with Stop() as stop:
        trainer = make_trainer_of(argv, stop)
        trainer.loader = TurnsLoader(trainer.loader, turns, trainer.folder / "metrics.jsonl")
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        turns.ready(
            precision=trainer.runtime.precision,
            threads=torch.get_num_threads(),
            parameters=sum(p.numel() for p in parameters),
            steps_per_epoch=trainer.loader.steps_per_epoch,
        )
        with trainer.tracking:
            trainer.train()


def make_trainer_of(argv: list[str], stop: Stop) -> Trainer:
    """Return what launch/train.py trains with, given its flags."""
    config = parse(argv)
    runtime = Runtime(config.train.precision, config.train.trackers, config.output)
    set_up_logging(runtime)
    folder = RunFolder(config.output)
    catalog, parts = load_data(config, runtime)
    built = build(config, catalog, parts, runtime)
    if runtime.is_main:
        folder.begin(config, runtime)
    runtime.wait()
    return make_trainer(config, built, parts, runtime, folder, stop)


def setting_of(argv: list[str]) -> Setting:
    """Return what launch/train.py builds a method from, given its flags."""
    config = parse(argv)
    catalog, parts = read_and_split(config.data)
    return loading.setting_of(config, parts, catalog)
