"""The training loop, step by step: what is normalised, clipped, scheduled, validated, saved and stopped when."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batches import TrainingSequences
from data.config import DataConfig
from data.negatives import UniformNegatives
from data.sources import read
from data.splits import split
from models.sasrec import SASRec, SASRecConfig
from trainers.checkpoint import restore_weights
from trainers.config import TrainConfig
from trainers.loop import NonFiniteLoss
from trainers.optimizer import learning_rate
from trainers.signals import Interrupted

from .conftest import Events, Points, Setup, weights


def log_lines(setup: Setup) -> list[dict[str, float]]:
    return [json.loads(line) for line in (setup.folder / "metrics.jsonl").read_text().splitlines()]


def losses(setup: Setup) -> list[float]:
    return [line["loss"] for line in log_lines(setup) if "loss" in line]


# --- Normalisation ---


def test_a_step_is_the_mean_over_all_labels(setup: Setup) -> None:
    model = Points(8)
    trainer = setup.trainer(model, examples=Events(8), max_steps=1, lr=0.5)
    trainer.train()
    labels = Events(8).lengths
    # d/dw of sum over labels of (w - 1)^2, divided by all labels of the step, times the rate.
    expected = torch.from_numpy(0.5 * 2 * labels / labels.sum()).float()
    torch.testing.assert_close(model.weight[1:].detach(), expected)
    assert losses(setup) == [1.0]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 7])
@pytest.mark.parametrize("loss", ["cross-entropy", "gbce"])
def test_accumulation_equals_one_big_batch(setup: Setup, micro_batch_size: int, loss) -> None:
    config = DataConfig(source="sample", sample_users=30)
    sample = split(read(config), config)
    # Rows of 1 to 20 labels: a mean of micro-batch means would differ.
    ragged = replace(sample, train_end=np.minimum(sample.train_end, np.arange(30) % 20 + 2))
    trained = []
    for size in (None, micro_batch_size):
        torch.manual_seed(1)
        model = SASRec(SASRecConfig(hidden_size=16, window=20, dropout=0.0, loss=loss), sample.num_items)
        negatives = UniformNegatives(ragged, 8, seed=0) if loss == "gbce" else None
        examples = TrainingSequences(ragged, 20, negatives=negatives)
        folder = replace(setup, folder=setup.folder / str(size))
        folder.folder.mkdir()
        trainer = folder.trainer(model, examples=examples, batch_size=12, micro_batch_size=size, max_steps=5, lr=0.5)
        trainer.train()
        trained.append((weights(model), losses(folder)))
    (whole, whole_losses), (accumulated, accumulated_losses) = trained
    assert (whole - weights(SASRec(SASRecConfig(hidden_size=16, window=20), sample.num_items))).abs().max() > 1e-2
    torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6)
    assert accumulated_losses == pytest.approx(whole_losses, rel=1e-6)


def test_micro_batches_have_the_size_that_was_asked_for(setup: Setup) -> None:
    model = Points(40)
    setup.trainer(model, micro_batch_size=3, max_steps=1).train()
    assert len(model.batches) == 3  # 3 + 3 + 2 of a step of 8


def test_parts_of_a_loss_are_logged_as_means(setup: Setup) -> None:
    setup.trainer(max_steps=2, log_every_steps=2, lr=1e-9).train()
    assert log_lines(setup)[0]["loss/error"] == pytest.approx(1.0)


def test_a_log_line_is_the_mean_since_the_line_before(setup: Setup) -> None:
    setup.trainer(max_steps=6, lr=0.3).train()
    each = losses(setup)
    other = replace(setup, folder=setup.folder / "other")
    other.folder.mkdir()
    trainer = other.trainer(max_steps=6, lr=0.3, log_every_steps=3)
    counts = [int(Events(40).lengths[step].sum()) for step in [*trainer.loader.plan(0), *trainer.loader.plan(1)]]
    trainer.train()
    expected = [np.average(each[i : i + 3], weights=counts[i : i + 3]) for i in (0, 3)]
    assert losses(other) == pytest.approx(expected, rel=1e-6)


# --- Optimisation ---


def test_clipping_limits_the_global_norm_and_logs_the_true_one(setup: Setup) -> None:
    moved = []
    for limit in (0.0, 0.05):
        folder = replace(setup, folder=setup.folder / str(limit))
        folder.folder.mkdir()
        model = Points(40)
        folder.trainer(model, max_steps=1, lr=1.0, max_grad_norm=limit).train()
        moved.append(weights(model).norm().item())
        assert log_lines(folder)[0]["grad_norm"] == pytest.approx(moved[0], rel=1e-5)
    assert moved[0] > 0.1
    assert moved[1] == pytest.approx(0.05, rel=1e-4)


def test_the_schedule_reaches_the_optimizer(setup: Setup) -> None:
    settings = {"max_steps": 9, "schedule": "linear", "warmup_steps": 3, "lr": 0.2}
    setup.trainer(**settings).train()
    config = TrainConfig(**settings)
    expected = [learning_rate(step, 9, config) for step in range(9)]
    assert [line["lr"] for line in log_lines(setup) if "loss" in line] == pytest.approx(expected)
    assert len(set(expected)) > 6


@pytest.mark.parametrize(("settings", "steps"), [({"epochs": 3}, 15), ({"epochs": 3, "max_steps": 7}, 7)])
def test_training_has_the_length_that_was_asked_for(setup: Setup, settings: dict[str, int], steps: int) -> None:
    progress = setup.trainer(**settings).train()
    assert progress.step == steps
    assert len(losses(setup)) == steps
    assert progress.validated_step == steps, "the last weights are validated, wherever an epoch ends"


def test_every_epoch_trains_every_example_once(setup: Setup) -> None:
    model = Points(40)
    setup.trainer(model, epochs=2).train()
    assert sum(model.batches) == 2 * Events(40).lengths.sum()


# --- Validation ---


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [5, 10, 15, 20]),
        ({"eval_every_epochs": 3}, [15, 20]),
        ({"eval_every_steps": 8}, [8, 16, 20]),
    ],
)
def test_validation_comes_when_asked_for_and_at_the_end(setup: Setup, settings, steps: list[int]) -> None:
    setup.trainer(epochs=4, **settings).train()
    assert [line["step"] for line in log_lines(setup) if "valid/NDCG@10" in line] == steps


def test_patience_ends_training_and_the_best_checkpoint_stays(setup: Setup) -> None:
    figures = iter([0.1, 0.5, 0.3, 0.5, 0.4, 0.9])
    seen = []

    def validate() -> dict[str, float]:
        seen.append(weights(model))
        return {"HR@5": next(figures), "NDCG@10": 0.0}

    model = Points(40)
    trainer = setup.trainer(model, validate, epochs=6, metric="HR@5", patience=3, lr=0.01)
    progress = trainer.train()
    # 0.5 comes again, but equal is not better: three validations after the second one, training ends.
    assert (progress.step, progress.best_step, progress.best_metric) == (25, 10, 0.5)
    best, latest = trainer.checkpoints.best(), trainer.checkpoints.latest()
    assert best is not None
    assert latest is not None
    assert (best.name, latest.name) == ("step-00000010", "step-00000025")
    restored = Points(40)
    restore_weights(best, restored)
    assert torch.equal(weights(restored), seen[1])


def test_a_metric_that_nobody_measures_is_an_error(setup: Setup) -> None:
    with pytest.raises(ValueError, match=r"--train\.metric NDCG@7 is none of NDCG@10"):
        setup.trainer(metric="NDCG@7").train()


def test_fresh_training_does_not_begin_with_a_validation(setup: Setup) -> None:
    setup.trainer(epochs=1).train()
    assert log_lines(setup)[0]["step"] == 1


# --- Stopping and going on ---


class StopAt:
    """A validation or model that sends this process a signal at the n-th call."""

    def __init__(self, call: int) -> None:
        self.calls, self.call = 0, call

    def __call__(self) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.call:
            signal.raise_signal(signal.SIGTERM)
        return {"NDCG@10": 0.1 * self.calls}


def uninterrupted(setup: Setup, **settings) -> tuple[torch.Tensor, list[dict[str, float]]]:
    folder = replace(setup, folder=setup.folder / "whole")
    folder.folder.mkdir()
    model = Points(40)
    folder.trainer(model, **settings).train()
    return weights(model), log_lines(folder)


def without_speed(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.endswith("_per_s") and k != "peak_memory"} for line in lines]


@pytest.mark.parametrize("step", [1, 4, 5, 6, 14])
def test_a_signal_in_a_step_is_obeyed_after_it_and_nothing_is_lost(setup: Setup, step: int) -> None:
    settings = {"epochs": 3, "lr": 0.05, "log_every_steps": 4, "optimizer": torch.optim.AdamW}
    whole, whole_lines = uninterrupted(setup, **settings)

    class Interrupting(Points):
        def forward(self, batch):
            if len(self.batches) + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            return super().forward(batch)

    with pytest.raises(Interrupted, match="SIGTERM") as interruption, setup.stop:
        setup.trainer(Interrupting(40), **settings).train()
    assert interruption.value.exit_code == 143
    setup.stop.number = None
    model = Points(40)
    trainer = setup.trainer(model, **settings)
    assert trainer.progress.step in (step, step + 1)
    trainer.train()
    torch.testing.assert_close(weights(model), whole, rtol=0, atol=0)
    assert without_speed(log_lines(setup)) == without_speed(whole_lines)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_signal_in_a_validation_is_obeyed_at_once(setup: Setup, call: int) -> None:
    settings = {"epochs": 3, "lr": 0.05}
    whole, whole_lines = uninterrupted(setup, validate=StopAt(-1), **settings)
    validate = StopAt(call)
    with pytest.raises(Interrupted), setup.stop:
        setup.trainer(validate=validate, **settings).train()
    assert validate.calls == call
    setup.stop.number = None
    again = StopAt(-1)
    again.calls = call - 1
    model = Points(40)
    trainer = setup.trainer(model, again, **settings)
    assert trainer.progress.step == 5 * call, "the step before the validation was saved before it"
    trainer.train()
    torch.testing.assert_close(weights(model), whole, rtol=0, atol=0)
    assert without_speed(log_lines(setup)) == without_speed(whole_lines)


def test_a_finished_run_trains_no_further(setup: Setup) -> None:
    setup.trainer(epochs=2).train()
    model = Points(40)
    setup.trainer(model, epochs=2).train()
    assert not model.batches
    assert len(losses(setup)) == 10


def test_a_longer_run_goes_on_where_the_shorter_one_ended(setup: Setup) -> None:
    whole, _ = uninterrupted(setup, epochs=4, lr=0.05)
    setup.trainer(epochs=2, lr=0.05).train()
    model = Points(40)
    setup.trainer(model, epochs=4, lr=0.05).train()
    torch.testing.assert_close(weights(model), whole, rtol=0, atol=0)


def test_checkpoints_come_when_asked_for(setup: Setup) -> None:
    trainer = setup.trainer(epochs=2, save_every_steps=3, keep_checkpoints=9)
    trainer.train()
    steps = [int(folder.name[-8:]) for folder in sorted(trainer.checkpoints.folder.glob("step-*"))]
    assert steps == [3, 5, 6, 9, 10]  # and at each validation


# --- Failures ---


def test_a_loss_that_is_not_finite_stops_with_the_examples(setup: Setup) -> None:
    trainer = setup.trainer(Points(40, poison=7), epochs=1, save_every_steps=1)
    step = next(i for i, examples in enumerate(trainer.loader.plan(0), start=1) if 6 in examples)
    with pytest.raises(NonFiniteLoss, match=rf"step {step} has loss nan.*--train\.lr"):
        trainer.train()
    report = json.loads((setup.folder / "non_finite_step_0.json").read_text())
    assert report["step"] == step
    assert report["loss"] == "nan"
    assert 6 in [example for batch in report["examples"] for example in batch]
    # No checkpoint ever holds what such a step leaves behind.
    latest = trainer.checkpoints.latest()
    assert (latest is None) == (step == 1)
    if latest is not None:
        assert int(latest.name[-8:]) == step - 1
        assert restore_weights(latest, clean := Points(40)).step == step - 1
        assert weights(clean).isfinite().all()


def test_a_gradient_that_is_not_finite_stops_too(setup: Setup) -> None:
    class Root(Points):
        def forward(self, batch):
            loss = super().forward(batch)
            return loss._replace(total=loss.total + (self.weight[0] * 0).sqrt())  # 0, but its slope is infinite

    with pytest.raises(NonFiniteLoss, match="gradient norm"):
        setup.trainer(Root(40), epochs=1, save_every_steps=1).train()
    assert not list((setup.folder / "checkpoints").glob("step-*")), "its weights are not finite any more"


def test_a_last_step_that_is_not_finite_is_noticed(setup: Setup) -> None:
    with pytest.raises(NonFiniteLoss):
        setup.trainer(Points(8, poison=3), examples=Events(8), max_steps=1).train()
