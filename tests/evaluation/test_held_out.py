"""The loss of a stage: a mean over labels whatever the batches, without dropout, and the same each time."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from evaluation.held_out import held_out_loss
from models.base import Loss
from trainers.progress import Progress


@dataclass
class Numbers:
    values: Tensor  # [n]

    @property
    def count(self) -> int:
        return len(self.values)


class Noisy(nn.Module):
    """Its loss is the sum of the numbers, of which dropout would lose some; a part of it is drawn."""

    def forward(self, batch: Numbers) -> Loss:
        kept = nn.functional.dropout(batch.values, 0.5, self.training)
        return Loss(kept.sum(), batch.count, {"drawn": torch.rand(()) * batch.count})


def test_a_mean_over_labels_that_batches_do_not_change():
    model = Noisy().train()
    whole = [Numbers(torch.arange(7.0))]
    cut = [Numbers(torch.arange(5.0)), Numbers(torch.arange(5.0, 7.0)), Numbers(torch.empty(0))]
    assert held_out_loss(model, whole, 1)["loss"] == held_out_loss(model, cut, 1)["loss"] == 3.0
    assert model.training
    assert held_out_loss(model, cut, 1)["drawn"] == held_out_loss(model, cut, 1)["drawn"]
    assert held_out_loss(model, cut, 1)["drawn"] != held_out_loss(model, cut, 2)["drawn"]


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="no label"):
        held_out_loss(Noisy(), [Numbers(torch.empty(0))], 1)


def test_the_lowest_loss_is_the_best():
    progress = Progress()
    for step, loss in enumerate([2.0, 1.0, 1.5], start=1):
        progress.step = step
        progress.record(loss, lower_is_better=True)
    assert (progress.best_step, progress.best_metric, progress.evaluations_since_best) == (2, 1.0, 1)
