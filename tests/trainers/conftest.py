"""A trainer over a few numbers: the real loop, loader, checkpoints and runtime around a model of one weight table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.batches import SequenceBatch
from data.loaders import TrainingLoader
from models.base import Loss
from trainers.checkpoint import Checkpoints, restore_optimizer, restore_weights
from trainers.config import TrainConfig
from trainers.loop import Trainer
from trainers.progress import Progress
from trainers.runtime import Runtime
from trainers.signals import Stop
from trainers.tracking import Tracking


class Events:
    """Examples of 1 to 6 events; example i holds the item i + 1."""

    def __init__(self, count: int) -> None:
        self.lengths = np.arange(count) % 6 + 1

    def collate(self, indices: np.ndarray, epoch: int, progress: float = 0.0) -> SequenceBatch:
        lengths = torch.from_numpy(self.lengths[indices])
        items = torch.from_numpy(indices)[:, None] + 1
        items = items * (torch.arange(int(lengths.max())) < lengths[:, None])
        labelled = items.flatten().nonzero()[:, 0]
        return SequenceBatch(items, lengths, labelled, items.flatten()[labelled], count=len(labelled))


class Points(nn.Module):
    """Moves one weight an item towards 1; `poison` makes the loss of its item NaN."""

    def __init__(self, num_items: int, poison: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_items + 1))
        self.poison = poison
        self.batches: list[int] = []  # labels of every training pass

    def forward(self, batch: SequenceBatch) -> Loss:
        assert batch.labelled is not None
        items = batch.items.flatten()[batch.labelled]
        self.batches.append(batch.count)
        errors = (self.weight[items] - 1) ** 2
        if self.poison is not None:
            errors = errors.where(items != self.poison, torch.nan)
        return Loss(errors.sum(), batch.count, {"error": errors.detach().sqrt().sum()})


@dataclass
class Setup:
    """Builds trainers in one run folder, as consecutive starts of one run would."""

    runtime: Runtime
    folder: Path
    stop: Stop = field(default_factory=Stop)

    def trainer(
        self,
        model: nn.Module | None = None,
        validate: Callable[[], dict[str, float]] = lambda: {"NDCG@10": 0.0},
        optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=1.0),
        examples: Any = None,
        **settings: Any,
    ) -> Trainer:
        config = TrainConfig(**{"batch_size": 8, "log_every_steps": 1, "lr": 0.1, "trackers": [], **settings})
        examples = examples or Events(40)
        model = model or Points(len(examples.lengths))
        own_optimizer = optimizer(model.parameters())
        share = self.runtime.share
        loader = TrainingLoader(examples, config.batch_size, config.micro_batch_size, share, config.seed)
        checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        progress = Progress()
        if (checkpoint := checkpoints.latest()) is not None:
            progress = restore_weights(checkpoint, model)
        prepared = self.runtime.prepare(model, own_optimizer, loader.micro_batch_size, config.max_grad_norm)
        if checkpoint is not None:
            restore_optimizer(checkpoint, model, prepared[1])
        checkpoints.go_on_from(checkpoint, progress)
        tracking = Tracking(self.runtime, self.folder, 100, {}, progress)
        return Trainer(
            *(self.runtime, *prepared, loader, validate, tracking),
            *(checkpoints, progress, config, self.folder, self.stop),
            saved_step=None if checkpoint is None else progress.step,
        )


@pytest.fixture
def runtime() -> Runtime:
    """One process, float32."""
    return Runtime("fp32")


@pytest.fixture
def setup(runtime: Runtime, tmp_path: Path) -> Setup:
    return Setup(runtime, tmp_path)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
