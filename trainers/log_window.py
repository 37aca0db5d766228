"""Sums since the last log line."""

import time

import torch
from torch import Tensor

from data.loaders import Step

from .runtime import Runtime


class LogWindow:
    """This process's sums, kept on the device, so that no step waits for them, and in checkpoints."""

    def __init__(self, runtime: Runtime, saved: dict[str, float]) -> None:
        self.runtime = runtime
        # Saved sums are those of all processes; the main one carries them on.
        self.sums: dict[str, Tensor | float] = {name: total * runtime.is_main for name, total in saved.items()}
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure speed from now on: what came before was not training."""
        self.started = time.perf_counter()

    def add(self, losses: dict[str, Tensor], step: Step, norm: Tensor) -> None:
        """Add a step; `losses` are sums over its labels under the names that the log shows."""
        known = {"labels": sum(batch.count for batch in step.batches), "examples": sum(map(len, step.indices))}
        for name, value in (losses | known).items():
            self.sums[name] = self.sums.get(name, 0.0) + (value.double() if isinstance(value, Tensor) else value)
        self.norm = norm

    def totals(self) -> dict[str, float]:
        """Return the sums over all processes; every process must call."""
        if not self.sums:
            return {}
        own = [torch.as_tensor(total, dtype=torch.float64, device=self.runtime.device) for total in self.sums.values()]
        totals = self.runtime.sum(torch.stack(own))
        return dict(zip(self.sums, totals.tolist(), strict=True))

    def mean(self) -> dict[str, float]:
        """Return the means over all labels of all processes, and start a new window; every process must call."""
        totals = self.totals()
        labels, examples = totals.pop("labels"), totals.pop("examples")
        seconds = time.perf_counter() - self.started
        self.sums = {}
        self.restart_clock()
        return {name: total / max(labels, 1) for name, total in totals.items()} | {
            "grad_norm": float(self.norm),
            "tokens_per_s": labels / seconds,
            "samples_per_s": examples / seconds,
        }
