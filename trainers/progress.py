"""How far a run has come: one object, saved with every checkpoint and restored from it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Position in training, and what validation has said so far."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epoch under way, 0-based
    step_in_epoch: int = 0  # steps done in it
    seconds: float = 0.0  # spent training, evaluations left out, over all starts
    validated_step: int = 0  # step of the last finished validation
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    log_window: dict[str, float] = field(default_factory=dict)  # sums since the last log line, see trainers/loop.py

    def record(self, metric: float, *, lower_is_better: bool = False) -> None:
        """Note a validation result."""
        self.validated_step = self.step
        best = self.best_metric
        if best is None or (metric < best if lower_is_better else metric > best):
            self.best_metric, self.best_step, self.evaluations_since_best = metric, self.step, 0
        else:
            self.evaluations_since_best += 1

    def forget_best(self) -> None:
        """Start looking for the best checkpoint anew: the one that was best is not there any more."""
        self.best_metric, self.best_step, self.evaluations_since_best = None, None, 0

    def state(self) -> dict[str, Any]:
        """Return a JSON-serialisable copy."""
        return asdict(self)
