"""Earlier runs that a method is built from: there, finished, and of the same data."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState

from data.batches import Examples
from data.loaders import EvaluationLoader, Share
from evaluation.run_folders import Run, load_run
from trainers.runtime import best_precision

from .setting import Setting

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Asking:
    """How finished runs are asked for scores before anything is trained: as they scored when they were trained."""

    dtype: torch.dtype | None  # of autocast
    batch_size: int

    @classmethod
    def like(cls, runs: Sequence[Run]) -> "Asking":
        """The precision that the runs have in common, else float32, and the smallest of their batches."""
        settings: list[dict[str, Any]] = [yaml.safe_load(run.config)["train"] for run in runs]
        device = PartialState().device
        precisions = {best_precision(device) if s["precision"] == "auto" else s["precision"] for s in settings}
        dtype = AUTOCAST.get(precisions.pop() if len(precisions) == 1 else "fp32")
        return cls(dtype, min(s["eval_batch_size"] for s in settings))

    def autocast(self) -> AbstractContextManager[Any]:
        """Passes inside are in that precision."""
        return nullcontext() if self.dtype is None else torch.autocast(PartialState().device.type, self.dtype)

    def batches(self, examples: Examples) -> EvaluationLoader:
        """This process's share of the examples, on its device."""
        state = PartialState()
        share = Share(state.process_index, state.num_processes)
        return EvaluationLoader(examples, self.batch_size, share, state.device)


def require_run(path: Path, flag: str, setting: Setting) -> Run:
    """Return the run in a folder that --method.`flag` names.

    Raises ValueError where it is gone, unfinished, or of another split or catalogue than the run that is built.
    """
    run = load_run(path)
    if not (path / "model" / "model.safetensors").is_file() or not run.results:  # which come last
        of = f" of {setting.saved.parent}" if setting.saved is not None else ""
        raise ValueError(
            f"--method.{flag}{of} names {path} (seen from {Path.cwd()}), where there is no finished run: bring it "
            "back there, or train anew with the folder where it is now"
        )
    if setting.saved is None and run.split_hash != setting.split.hash:
        raise ValueError(
            f"--method.{flag} {path} was trained on split {run.split_hash[:12]}, and --data.* gives "
            f"{setting.split.hash[:12]}: both runs need the same data and split"
        )
    if json.loads((path / "model" / "catalog.json").read_text())["raw_ids"] != [*setting.catalog.raw_ids]:
        raise ValueError(
            f"--method.{flag} {path} has learned another catalogue than these {setting.catalog.num_items:,} items: "
            "both runs need the same --data.item_core and files"
        )
    return run
