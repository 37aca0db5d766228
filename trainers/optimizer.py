"""Parameter groups and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from .config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; norms, biases and embedding tables are not decayed."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter: check --backbone.adapter")
    decayed = [p for p in trainable if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in trainable if p.ndim < 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the rate for optimizer step `step` (0-based): a pure function, so that nothing is saved to resume."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * max(0.0, 1 - done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
