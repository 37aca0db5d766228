"""Which strategies, micro-batches and flags fit a GPU, by forecast."""

import shlex
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from models.losses import CHUNK_ROWS

from .config import RunConfig
from .memory import STRATEGIES, Forecast, Strategy, forecast
from .methods import METHODS
from .rehearsal import Rehearsal, rehearse

LOSS_ROWS = CHUNK_ROWS["cuda"]  # one chunk of logits is alive at a time; up to there memory grows faster with the rows
MOST_REMEDIES = 6
FURTHER = 8  # from a micro-batch that fits to the next one tried


@dataclass(frozen=True)
class Fit:
    """A strategy's forecast against the memory of a GPU."""

    forecast: Forecast
    title: str
    fits: bool
    largest_micro_batch: int  # no more than a GPU's share of a step; 0 where not even one row fits


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
        self.share = ceil(config.train.batch_size / gpus)  # of a step's examples, on each GPU
        self.micro_batch = min(config.train.micro_batch_size or self.share, self.share)
        self._rehearsed: dict[int, Rehearsal] = {}
        self.optimizer: str = getattr(config.train, "optimizer", "adamw")

    @property
    def rehearsal(self) -> Rehearsal:
        """The micro-batch that is asked for."""
        return self._rehearse(self.micro_batch)

    def fits(self, gpu_bytes: int) -> list[Fit]:
        """Return every strategy with its forecast, fastest first."""
        return [self.fit(strategy, gpu_bytes) for strategy in STRATEGIES]

    def fit(self, strategy: Strategy, gpu_bytes: int) -> Fit:
        """Return one strategy's forecast."""
        here = self._forecast(self.rehearsal, strategy, self.micro_batch)
        fits = here.total <= gpu_bytes
        # `largest` counts gradients as if a step had several micro-batches, which this one may not have
        largest = max(self.largest(strategy, gpu_bytes), self.micro_batch if fits else 0)
        return Fit(here, strategy.title_for(self.gpus), fits, largest)

    def command(self, fit: Fit, flags: list[str]) -> str:
        """Return the command that trains so, with flags of launch/train.py: a micro-batch only where it fits."""
        if not fit.fits:
            flags = [*flags, "--train.micro_batch_size", str(self.even(fit.largest_micro_batch))]
        return shlex.join([*launcher(fit.forecast.strategy, self.gpus).split(), "launch/train.py", *flags])

    def remedies(self, gpu_bytes: int, strategy: Strategy = STRATEGIES[0]) -> list[str]:
        """Return flags that would make the run fit, cheapest first; each line is enough by itself."""
        found: list[str] = []
        for changes, flags in self._changes():
            planner = self._changed(changes)
            rows = planner.rows_that_fit(strategy, gpu_bytes)
            if rows and (changes or rows < self.micro_batch):
                found.append(f"{flags} {self._micro_batch_flag(rows)}".strip())
        # ZeRO costs communication, so it must allow more rows than there would be without it.
        rows_now = self.rows_that_fit(strategy, gpu_bytes)
        for other in STRATEGIES[STRATEGIES.index(strategy) + 1 :]:
            if (rows := self.rows_that_fit(other, gpu_bytes)) > rows_now:
                found.append(f"{launcher(other, self.gpus)} {self._micro_batch_flag(rows)}".strip())
        return found[:MOST_REMEDIES]

    def rows_that_fit(self, strategy: Strategy, gpu_bytes: int) -> int:
        """Return the micro-batch that is asked for where it fits, else the largest that does; 0 where none does."""
        if self._forecast(self.rehearsal, strategy, self.micro_batch).total <= gpu_bytes:
            return self.micro_batch
        return self.even(min(self.largest(strategy, gpu_bytes), self.micro_batch - 1))

    def even(self, rows: int) -> int:
        """Return the smallest micro-batch that needs no more passes a step than one of `rows` does."""
        return ceil(self.share / ceil(self.share / rows)) if rows else 0

    def _micro_batch_flag(self, rows: int) -> str:
        return "" if rows == self.micro_batch else f"--train.micro_batch_size {rows}"

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

    def largest(self, strategy: Strategy, gpu_bytes: int, refinements: int = 0) -> int:
        """Return how many rows of a step's share fit, or a few less; each refinement rehearses once more.

        The peak is the highest of several moments, each a line in the rows. So a line through one number of rows that
        fits and one that does not lies above what is between them, and what it promises is kept.
        """
        fits, fits_not = self._bracket(strategy, gpu_bytes)
        for _ in range(refinements + 1):
            if fits_not - fits <= 1 or not fits:
                break
            start, end = self._bytes(fits, strategy), self._bytes(fits_not, strategy)
            better = fits + int((gpu_bytes - start) / (end - start) * (fits_not - fits))
            if better == fits:
                break
            fits = better
        return fits

    def _bracket(self, strategy: Strategy, gpu_bytes: int) -> tuple[int, int]:
        """Return rows that fit and rows that do not; the former are exact where few do."""
        fits, fits_not = 0, self.micro_batch
        while self._bytes(fits_not, strategy) <= gpu_bytes:
            if fits_not == self.share:
                return self.share, self.share + 1
            fits, fits_not = fits_not, min(FURTHER * fits_not, self.share)
        # Where the loss has less than full chunks, more rows also mean more logits: no line, but few to try.
        few = ceil(LOSS_ROWS / self.length)
        if not fits and few < fits_not:
            fits, fits_not = (few, fits_not) if self._bytes(few, strategy) <= gpu_bytes else (0, few)
        while fits < few and fits_not - fits > 1:
            middle = (fits + fits_not) // 2
            if self._bytes(middle, strategy) <= gpu_bytes:
                fits = middle
            else:
                fits_not = middle
        return fits, fits_not

    def _bytes(self, rows: int, strategy: Strategy) -> int:
        """Return what a GPU needs for steps of several micro-batches, which is no less than for those of one."""
        return self._forecast(self._rehearse(rows), strategy, micro_batch=1).total

    def _forecast(self, rehearsal: Rehearsal, strategy: Strategy, micro_batch: int) -> Forecast:
        accumulates = micro_batch * self.gpus < self.config.train.batch_size
        return forecast(rehearsal, strategy, self.gpus, self.optimizer, accumulates)

    def _rehearse(self, micro_batch: int) -> Rehearsal:
        if micro_batch not in self._rehearsed:
            self._rehearsed[micro_batch] = rehearse(self.config, self.num_items, self.length, micro_batch)
        return self._rehearsed[micro_batch]


def flags_that_would_fit(
    config: RunConfig, num_items: int, longest: int, num_processes: int, gpu_bytes: int, strategy: str = "ddp"
) -> list[str]:
    """Return flags that would fit a run that ran out of memory, cheapest first; each line is enough by itself.

    `longest` is the longest row in tokens (or events), `gpu_bytes` the memory of one GPU, and `strategy` the name of
    the Accelerate configuration in use. The lines are forecasts. Nothing is returned where nothing is known to fit.
    """
    if METHODS[config.model].skeleton is None:
        return []  # the runs that it begins with are what would have to be smaller
    used = next(known for known in STRATEGIES if known.name == strategy)
    return Planner(config, num_items, longest, num_processes).remedies(gpu_bytes, used)
