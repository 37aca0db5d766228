"""Where the numbers go: metrics.jsonl always, trackers when asked, and a progress bar or plain lines for people."""

import json
import logging
import math
import resource
import time
from pathlib import Path
from typing import Any

import rich.progress
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from .progress import Progress
from .runtime import Runtime

logger = logging.getLogger("shardrec")


class Tracking:
    """Writes log lines on the main process and does nothing on the others."""

    def __init__(
        self, runtime: Runtime, folder: Path, total_steps: int, settings: dict[str, Any], progress: Progress
    ) -> None:
        self.runtime, self.file = runtime, folder / "metrics.jsonl"
        if runtime.is_main:
            self._forget_after(progress)
        if runtime.accelerator.log_with:
            repeated = {"tensorboard": {"purge_step": progress.step + 1}}  # hidden there: this run logs them again
            plain = {
                name: value if isinstance(value, int | float | bool | str) else str(value)
                for name, value in flat(settings).items()
            }
            runtime.accelerator.init_trackers("shardrec", config=plain, init_kwargs=repeated)
        console = Console()
        self.bar = rich.progress.Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (runtime.is_main and console.is_terminal),
        )
        self.task = self.bar.add_task("train", total=total_steps, epoch=0, note="")
        self.plain = runtime.is_main and self.bar.disable
        self.last_plain_line = 0.0

    def __enter__(self) -> "Tracking":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        while self.runtime.accelerator.trackers:  # also when a signal ends the run: they write what they still hold
            self.runtime.accelerator.trackers.pop().finish()

    def _forget_after(self, progress: Progress) -> None:
        """Drop the lines of later steps and validations, which this run writes again, and one that was cut off."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines(keepends=True):
            values = json.loads(line) if line.endswith("\n") else {"step": math.inf}
            if values["step"] <= (progress.step if "loss" in values else progress.validated_step):
                kept.append(line)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text("".join(kept))
        unfinished.replace(self.file)

    def log(self, values: dict[str, float | int]) -> None:
        """Record one line; it must carry "step"."""
        if not self.runtime.is_main:
            return
        with self.file.open("a") as stream:
            stream.write(json.dumps(values) + "\n")
        if self.runtime.accelerator.log_with:
            step = int(values["step"])
            self.runtime.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=step)
        self._show(values)

    def _show(self, values: dict[str, float | int]) -> None:
        if "loss" not in values:
            shown = {k: v for k, v in values.items() if k.startswith("valid/") and ("@10" in k or "@" not in k)}
            note = "  ".join(f"{k} {v:.4f}" for k, v in shown.items())
            text = f"epoch {values['epoch']}  step {values['step']}  {note}"
            if self.plain:
                logger.info(text)
            else:
                self.bar.console.print(text, highlight=False)
            return
        note = f"loss {values['loss']:.4f}  {values['samples_per_s']:.0f} samples/s  "
        note += f"{values['tokens_per_s']:.0f} tokens/s"
        self.bar.update(self.task, completed=values["step"], epoch=values["epoch"], note=note)
        # Without a terminal one line every few seconds is enough for a log file.
        if self.plain and time.monotonic() - self.last_plain_line > 10:
            self.last_plain_line = time.monotonic()
            total = self.bar.tasks[0].total
            logger.info("epoch %s  step %s/%s  %s", values["epoch"], values["step"], total, note)


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this process: on the accelerator when there is one, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
