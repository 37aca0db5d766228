"""Trainers that descend from that of transformers, as contestants."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.contest import Turns


class Wait(TrainerCallback):
    """Lets a trainer take a step only when it is its turn, and tells the loss that it has logged of a round."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.step(lambda: {"loss": next(line["loss"] for line in reversed(state.log_history) if "loss" in line)})


def arguments(folder: Path, batch: int, lr: float, steps: int, precision: str) -> dict[str, Any]:
    """Return what makes a step the same as ours: constant rate, no clipping; nothing is saved or shown."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1000,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "bf16": precision == "bf16",
        "use_cpu": True,
        "logging_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(trainer: Any, turns: Turns, precision: str) -> None:
    """Train until the contest is over."""
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    turns.ready(precision=precision, threads=torch.get_num_threads(), parameters=parameters)
    trainer.train()
