"""Which strategies, micro-batches and flags fit a GPU, by forecast."""

import shlex
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from .config import RunConfig
from .memory import STRATEGIES, Forecast, Strategy, forecast
from .rehearsal import Rehearsal, rehearse
from .skeletons import make_skeleton

LOSS_ROWS = 1024  # rows of logits at once (models/losses.py): below it memory grows faster with the micro-batch
MOST_REMEDIES = 6


@dataclass(frozen=True)
class Fit:
    """A strategy's forecast against the memory of a GPU."""

    forecast: Forecast
    title: str
    fits: bool
    largest_micro_batch: int  # 0 where not even one row fits

    def command(self, gpus: int, flags: list[str]) -> str:
        """Return the command that trains so; `flags` are those of launch/train.py."""
        launch = launcher(self.forecast.strategy, gpus)
        if not self.fits:
            flags = [*flags, "--train.micro_batch_size", str(self.largest_micro_batch)]
        return shlex.join([*launch.split(), "launch/train.py", *flags])


def launcher(strategy: Strategy, gpus: int) -> str:
    """Return how a strategy is started."""
    if strategy.stage == 0 and gpus == 1:
        return "accelerate launch"
    return f"accelerate launch --config_file launch/accelerate/{strategy.name}.yaml --num_processes {gpus}"


class Planner:
    """Forecasts for one configuration, on so many GPUs of one machine.

    Raises ValueError, naming the flag, for a backbone whose config.json cannot be read.
    """

    def __init__(self, config: RunConfig, num_items: int, length: int, gpus: int) -> None:
        self.config, self.num_items, self.length, self.gpus = config, num_items, length, gpus
        share = ceil(config.train.batch_size / gpus)
        self.micro_batch = min(config.train.micro_batch_size or share, share)
        self.optimizer: str = getattr(config.train, "optimizer", "adamw")

    @cached_property
    def rehearsal(self) -> Rehearsal:
        return self._rehearse(self.micro_batch)

    @cached_property
    def _larger(self) -> tuple[Rehearsal, Rehearsal]:
        """Two micro-batches whose difference says what a row costs."""
        enough = max(self.micro_batch, ceil(LOSS_ROWS / self.length))
        return self.rehearsal if enough == self.micro_batch else self._rehearse(enough), self._rehearse(2 * enough)

    @property
    def note(self) -> str:
        """What the forecast leaves out, if anything."""
        return make_skeleton(self.config, self.num_items).note

    def fits(self, gpu_bytes: int) -> list[Fit]:
        """Return every strategy with its forecast, fastest first."""
        return [self.fit(strategy, gpu_bytes) for strategy in STRATEGIES]

    def fit(self, strategy: Strategy, gpu_bytes: int) -> Fit:
        """Return one strategy's forecast."""
        here = self._forecast(self.rehearsal, strategy, self.micro_batch)
        largest = self._largest(strategy, gpu_bytes)
        fits = here.total <= gpu_bytes
        largest = max(largest, self.micro_batch) if fits else min(largest, self.micro_batch - 1)
        return Fit(here, strategy.title_for(self.gpus), fits, largest)

    def remedies(self, gpu_bytes: int, strategy: Strategy = STRATEGIES[0]) -> list[str]:
        """Return flags that would make the run fit, cheapest first; each line is enough by itself."""
        found: list[str] = []
        for changes, flags in self._changes():
            planner = self._changed(changes)
            if flag := planner.flags_for(strategy, gpu_bytes, flags):
                found.append(flag)
        for other in STRATEGIES[1:]:
            start = launcher(other, self.gpus)
            if flag := self.flags_for(other, gpu_bytes, start):
                found.append(flag)
        return found[:MOST_REMEDIES]

    def flags_for(self, strategy: Strategy, gpu_bytes: int, flags: str) -> str | None:
        """Return `flags`, with a smaller micro-batch where that is needed to fit; None where nothing fits."""
        fit = self.fit(strategy, gpu_bytes)
        if fit.fits:
            return flags or None
        if fit.largest_micro_batch:
            return f"{flags} --train.micro_batch_size {fit.largest_micro_batch}".strip()
        return None

    def _changes(self) -> list[tuple[dict[str, Any], str]]:
        """Return changes of the backbone's settings with their flags, from nothing to the most costly."""
        backbone = self.config.backbone
        changes: list[tuple[dict[str, Any], str]] = [({}, "")]
        if backbone is None:
            return changes
        if not backbone.gradient_checkpointing:
            changes.append(({"gradient_checkpointing": True}, "--backbone.gradient_checkpointing true"))
        if backbone.uses_lora and backbone.quantization != "4bit":
            four_bits = {"quantization": "4bit"}, "--backbone.quantization 4bit"
            changes += [four_bits] + [(change | four_bits[0], f"{flag} {four_bits[1]}") for change, flag in changes[1:]]
        return changes

    def _changed(self, changes: dict[str, Any]) -> "Planner":
        if not changes:
            return self
        assert self.config.backbone is not None
        config = replace(self.config, backbone=replace(self.config.backbone, **changes))
        return Planner(config, self.num_items, self.length, self.gpus)

    def _largest(self, strategy: Strategy, gpu_bytes: int) -> int:
        """Return how many rows fit; memory is a line in them once the loss works in full chunks."""
        some, twice = self._larger
        rows = max(self.micro_batch, ceil(LOSS_ROWS / self.length))
        small = self._forecast(some, strategy, rows).total
        row = (self._forecast(twice, strategy, rows).total - small) / rows
        return max(0, int(rows + (gpu_bytes - small) / row))

    def _forecast(self, rehearsal: Rehearsal, strategy: Strategy, micro_batch: int) -> Forecast:
        accumulates = micro_batch * self.gpus < self.config.train.batch_size
        return forecast(rehearsal, strategy, self.gpus, self.optimizer, accumulates)

    def _rehearse(self, micro_batch: int) -> Rehearsal:
        return rehearse(self.config, self.num_items, self.length, micro_batch)


def flags_that_would_fit(
    config: RunConfig, num_items: int, longest: int, num_processes: int, gpu_bytes: int, strategy: str = "ddp"
) -> list[str]:
    """Return flags that would fit a run that ran out of memory, cheapest first; each line is enough by itself.

    `longest` is the longest row in tokens (or events), `gpu_bytes` the memory of one GPU, and `strategy` the name of
    the Accelerate configuration in use. The lines are forecasts. Nothing is returned where nothing is known to fit.
    """
    used = next(known for known in STRATEGIES if known.name == strategy)
    return Planner(config, num_items, longest, num_processes).remedies(gpu_bytes, used)
