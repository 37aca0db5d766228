"""Parameter groups and the learning rate as a function of the step."""

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from .config import TrainConfig

Value = TypeVar("Value")


class ClippedPart(NamedTuple):
    """Parameters whose gradients are clipped together."""

    max_norm: float  # 0 does not clip
    parameters: list[nn.Parameter]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters; norms, biases and embedding tables are not decayed.

    Raises ValueError when nothing is trainable, or a prefix of lr_multipliers, frozen_epochs or max_grad_norms begins
    no parameter's name.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: check --backbone.adapter")
    for flag in ("lr_multipliers", "frozen_epochs", "max_grad_norms"):
        for prefix in getattr(config, flag):
            if not any(name.startswith(prefix) for name in trainable):
                raise ValueError(
                    f"--train.{flag} has {prefix}, and no trainable parameter's name begins so; names begin with "
                    f"{', '.join(sorted({name.partition('.')[0] for name in trainable}))}"
                )
    own_norm = {prefix: prefix for prefix in config.max_grad_norms}
    groups: dict[tuple[float, float, float, str | None], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        decay = config.weight_decay if parameter.ndim >= 2 and id(parameter) not in tables else 0.0
        multiplier, frozen = _of_prefix(name, config.lr_multipliers, 1.0), _of_prefix(name, config.frozen_epochs, 0)
        part = _of_prefix(name, own_norm, None)
        groups.setdefault((multiplier, frozen, decay, part), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": decay, "multiplier": multiplier, "frozen_epochs": frozen}
        | {"part": part, "max_grad_norm": config.max_grad_norm if part is None else config.max_grad_norms[part]}
        for (multiplier, frozen, decay, part), parameters in groups.items()
    ]
    if config.optimizer == "adamw-8bit-paged":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(settings, lr=config.lr, betas=config.betas)
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, fused=True)


def clipped_parts(optimizer: torch.optim.Optimizer) -> list[ClippedPart]:
    """Return what max_grad_norms clips alone, and what is left as a part of its own; nothing where it is not set."""
    parts: dict[str | None, ClippedPart] = {}
    for group in optimizer.param_groups:
        part = parts.setdefault(group.get("part"), ClippedPart(group.get("max_grad_norm", 0.0), []))
        part.parameters.extend(group["params"])
    return [] if set(parts) == {None} else list(parts.values())


def _of_prefix(name: str, values: Mapping[str, Value], default: Value) -> Value:
    """Return the value of the longest prefix that a parameter's name begins with."""
    prefixes = [prefix for prefix in values if name.startswith(prefix)]
    return values[max(prefixes, key=len)] if prefixes else default


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the rate for optimizer step `step` (0-based): a pure function, so that nothing is saved to resume."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    left = max(0.0, 1 - done) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, epoch: int = 0) -> None:
    """Give every parameter group its multiple of `rate`; a group that is still frozen gets 0, which changes nothing."""
    for group in optimizer.param_groups:
        frozen = epoch < group.get("frozen_epochs", 0)
        group["lr"] = 0.0 if frozen else rate * group.get("multiplier", 1.0)
