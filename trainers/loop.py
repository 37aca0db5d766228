"""The only training loop."""

import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from data.batches import to_device
from data.loaders import Step, TrainingLoader
from evaluation.held_out import LOSS

from .checkpoint import Checkpoints
from .config import TrainConfig
from .log_window import LogWindow
from .optimizer import learning_rate, set_learning_rate
from .progress import Progress
from .runtime import HostCopy, Runtime
from .signals import Interrupted, Stop
from .tracking import Tracking, peak_memory

logger = logging.getLogger("shardrec")

# Returns the validation metrics of the current weights.
Validate = Callable[[], dict[str, float]]


class NonFiniteLoss(RuntimeError):
    """The loss of a step was NaN or infinite; the message names the file with the step's examples."""


@dataclass
class Trainer:
    """Everything one run of the loop needs. `train` is the story; the other methods are its chapters."""

    runtime: Runtime
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: TrainingLoader
    validate: Validate
    tracking: Tracking
    checkpoints: Checkpoints
    progress: Progress
    config: TrainConfig
    folder: Path
    stop: Stop
    saved_step: int | None = None  # step of the newest whole checkpoint in `checkpoints`

    def train(self) -> Progress:
        """Train from `progress` to the end, validating, checkpointing and logging on the way.

        Raises `NonFiniteLoss`, and `Interrupted` once a signal has come and the state is saved.
        """
        self.total_steps = self.config.max_steps or self.config.epochs * self.loader.steps_per_epoch
        self.window = LogWindow(self.runtime, self.progress.log_window)
        self.previous: tuple[Step, Tensor, Tensor] | None = None  # with its loss and its gradient norm
        self._require_same_step()
        with self.stop.deferred():
            if self.progress.step > self.progress.validated_step and self._is_time_to_validate():
                self._validate()  # the run was stopped between this step and its validation
            while not self._is_done():
                for step in self.loader.epoch(self.progress.epoch, self.progress.step_in_epoch):
                    stopping = self._train_step(step)
                    if self.progress.step % self.config.log_every_steps == 0 or self._is_done():
                        self._log()
                    if stopping:
                        self._save()
                        raise Interrupted(self.stop.number or signal.SIGTERM)
                    if self._is_time_to_validate():
                        self._save()
                        self._validate()
                    elif self._is_time_to_save():
                        self._save()
                    if self._is_done():
                        break
                else:
                    self.progress.epoch, self.progress.step_in_epoch = self.progress.epoch + 1, 0
        return self.progress

    def _train_step(self, step: Step) -> bool:
        """Do one optimizer step; return whether any process was asked to stop."""
        started = time.perf_counter()
        config, progress = self.config, self.progress
        self.runtime.watchdog.arrive(f"step {progress.step + 1}")
        self.rate = learning_rate(progress.step, self.total_steps, config)
        set_learning_rate(self.optimizer, self.rate, progress.epoch)
        # Dropout is a function of (seed, step, process), so a resumed run repeats it without saved generators.
        set_seed(hash_seed(config.seed, progress.step, self.runtime.share.process_index))
        labels, news = self._agree(step)
        self.model.train()
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(self.runtime.watchdog.each(step.batches)):
            with self.runtime.accumulating(self.model, is_last=i == len(step.batches) - 1):
                loss = self.model(batch.to(self.runtime.device))
                self.runtime.backward(loss.total, labels)
            parts = {f"loss/{name}": part for name, part in loss.parts.items()}
            for name, value in {"loss": loss.total.detach(), **parts}.items():
                sums[name] = sums[name] + value if name in sums else value
        norm = self.runtime.clip_grad_norm(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Read this late, since it was on its way before this step's work was queued: nothing waits for that work.
        stopping, failures = news.read()
        self._require_finite(failures)
        progress.step, progress.step_in_epoch = progress.step + 1, progress.step_in_epoch + 1
        self.previous = (step, sums["loss"], norm)
        self.window.add(sums, step, norm)
        progress.seconds += time.perf_counter() - started
        return bool(stopping)

    def _agree(self, step: Step) -> tuple[Tensor, HostCopy]:
        """Return the labels of the whole step, and how many processes were asked to stop or failed the step before."""
        local = [sum(batch.count for batch in step.batches), int(self.stop.number is not None)]
        flags = torch.cat([to_device(torch.tensor(local), self.runtime.device), self._failed()])
        sums = self.runtime.sum(flags)
        return sums[0].clamp(min=1), HostCopy(sums[1:])

    def _failed(self) -> Tensor:
        """Return [1] int64: whether the previous step's loss or gradient was not finite on this process."""
        if self.previous is None:
            return torch.zeros(1, dtype=torch.int64, device=self.runtime.device)
        _, loss, norm = self.previous
        # With fp16 an infinite gradient is no failure: the loss scaler skips that step and scales less.
        health = loss if self.runtime.scaler else loss + norm
        return (~health.isfinite()).long().reshape(1)

    def _require_finite(self, failures: int) -> None:
        """Raise `NonFiniteLoss` on every process when the step before failed on any of them."""
        if not failures:
            return
        assert self.previous is not None
        step, loss, norm = self.previous
        file = self.folder / f"non_finite_step_{self.runtime.share.process_index}.json"
        examples = [indices.tolist() for indices in step.indices]
        report = {"step": self.progress.step, "loss": str(loss.item()), "grad_norm": str(norm.item())}
        file.write_text(json.dumps(report | {"examples": examples}))
        raise NonFiniteLoss(
            f"step {self.progress.step} has loss {loss.item()} and gradient norm {norm.item()}; its examples are "
            f"listed in {file}. Lower --train.lr, set --train.max_grad_norm 1.0, or use --train.precision fp32"
        )

    def _log(self) -> None:
        values = self.window.mean()
        self.tracking.log(
            {"step": self.progress.step, "epoch": self.progress.epoch, **values, "lr": self.rate}
            | {"peak_memory": peak_memory(self.runtime.device)}
        )

    def _is_done(self) -> bool:
        patience = self.config.patience
        out_of_patience = patience is not None and self.progress.evaluations_since_best >= patience
        return self.progress.step >= self.total_steps or out_of_patience

    def _is_time_to_validate(self) -> bool:
        if self.progress.step >= self.total_steps:
            return True
        steps = self.config.eval_every_steps or self.config.eval_every_epochs * self.loader.steps_per_epoch
        return self.progress.step % steps == 0

    def _is_time_to_save(self) -> bool:
        steps = self.config.save_every_steps
        return steps is not None and self.progress.step % steps == 0

    def _validate(self) -> None:
        """Validate and note it in the checkpoint of this step; a signal ends the run at once, for nothing is lost."""
        with self.stop.at_once():
            metrics = self.validate()
        if self.config.metric not in metrics:
            raise ValueError(f"--train.metric {self.config.metric} is none of {', '.join(metrics)}")
        self.progress.record(metrics[self.config.metric], lower_is_better=self.config.metric == LOSS)
        named = {f"valid/{name}": value for name, value in metrics.items()}
        self.tracking.log({"step": self.progress.step, "epoch": self.progress.epoch, **named})
        self._save()
        self.window.restart_clock()

    def _save(self) -> None:
        """Save the state of this step, or only its progress where the rest is saved already."""
        self._require_finite(int(self.runtime.sum(self._failed())))
        self.progress.log_window = self.window.totals()
        is_new = self.saved_step != self.progress.step
        state = self.runtime.state(self.model, self.optimizer) if is_new else None

        def write() -> None:
            if state is None:
                self.checkpoints.note(self.progress)
            else:
                self.checkpoints.save(state, self.progress)

        self.runtime.on_main(write)
        self.saved_step = self.progress.step

    def _require_same_step(self) -> None:
        """Raise when processes go on from different checkpoints, as they would if each saw a run folder of its own."""
        steps = int(self.runtime.sum(torch.tensor(self.progress.step, device=self.runtime.device)))
        if steps != self.progress.step * self.runtime.share.num_processes:
            raise RuntimeError(
                f"process {self.runtime.share.process_index} goes on from step {self.progress.step}, others from "
                f"other steps: {self.folder} must be on a file system that all processes share (--output)"
            )


def hash_seed(*parts: int) -> int:
    """Return a 31-bit seed that differs whenever any part does."""
    value = 0
    for part in parts:
        value = (value * 1_000_003 + part + 1) % (2**31 - 1)
    return value
