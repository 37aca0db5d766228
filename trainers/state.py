"""What a checkpoint holds of a model and its optimizer: whole tensors by parameter name, whatever spreads them.

A run may therefore go on under another number of processes, with DDP instead of ZeRO, or under another stage of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import Tensor, nn

from .zero import Zero, full_shape, gathered, trainable


@dataclass(frozen=True)
class TrainingState:
    """Weights and optimizer state on the CPU; `scaler` is what keeps fp16 gradients in range."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)  # "<parameter>/<key>"
    scaler: dict[str, Any] = field(default_factory=dict)


def weights_of(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Return the trainable parameters and saved buffers by name; tied parameters come once. Collective under ZeRO-3.

    `model.saved_buffers` names what is not trained but found in training, and so belongs to the weights. A process
    that only takes part does not `keep` them: the memory of a host may not hold the weights once for each of its GPUs.
    """
    weights = {name: on_host(model.get_buffer(name)) for name in _saved_buffers(model) if keep}
    for name, parameter in trainable(model):
        with gathered([parameter]):
            if keep:
                weights[name] = on_host(parameter)
    return weights


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in the memory of the host."""
    tensor = tensor.detach()
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.is_cpu else tensor.cpu().contiguous()


def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's saved buffers, which in batch norm differ: those are saved. Collective."""
    for name in _saved_buffers(model):
        broadcast(model.get_buffer(name))


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the weights in `file` into `model`; raise ValueError unless both have the same. Collective under ZeRO-3."""
    saved = _read_weights(model, file)
    for name, tensor in _weights(model):
        with gathered([tensor], write=True), torch.no_grad():
            tensor.copy_(saved[name])


def load_weights_of_main(model: nn.Module, file: Path, is_main: bool) -> None:
    """Let the main process load `file`, which other hosts may not see, and give the weights to all. Collective."""
    saved = _read_weights(model, file) if is_main else {}
    for name, tensor in _weights(model):
        with gathered([tensor], write=True), torch.no_grad():
            if is_main:
                tensor.copy_(saved[name])
            broadcast(tensor)


def _read_weights(model: nn.Module, file: Path) -> dict[str, Tensor]:
    """Return the weights in `file` by name; raise ValueError unless they are those of `model`."""
    saved = load_file(file)
    shapes = {name: full_shape(tensor) for name, tensor in _weights(model)}
    missing, unexpected = sorted(shapes.keys() - saved.keys()), sorted(saved.keys() - shapes.keys())
    wrong = sorted(name for name in shapes.keys() & saved.keys() if shapes[name] != saved[name].shape)
    if missing or unexpected or wrong:
        raise ValueError(
            f"{file} does not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shapes {wrong[:3]}: was it trained with other --method or --backbone settings?"
        )
    return saved


def optimizer_state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, zero: Zero | None, keep: bool = True
) -> dict[str, Tensor]:
    """Return every tensor that the optimizer keeps of a parameter, as "<parameter>/<key>". Collective under ZeRO.

    What a process does not `keep` it has not copied: see `weights_of`.
    """
    if zero is not None:
        return zero.optimizer_state(model, keep)
    if not keep:
        return {}
    return {
        f"{name}/{key}": on_host(torch.as_tensor(value))
        for name, parameter in trainable(model)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, zero: Zero | None, saved: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_state_of` returned, perhaps elsewhere."""
    if zero is not None:
        zero.load_optimizer_state(model, saved)
        return
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, value in saved.items():
        parameter_name, _, key = name.rpartition("/")
        # The step is a tensor for torch, and was a plain number where it is an integer: for bitsandbytes.
        is_number = value.ndim == 0 and not value.is_floating_point()
        by_parameter.setdefault(parameter_name, {})[key] = value.item() if is_number else value
    names = {id(parameter): name for name, parameter in trainable(model)}
    state = optimizer.state_dict()
    ids = [i for group in state["param_groups"] for i in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        i: by_parameter[names[id(parameter)]]
        for i, parameter in zip(ids, parameters, strict=True)
        if names[id(parameter)] in by_parameter
    }
    optimizer.load_state_dict(state)
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper passes nothing else on
    if getattr(inner, "is_paged", False):
        page_again(inner)


def page_again(optimizer: Any) -> None:
    """Put the loaded moments of a paged optimizer of bitsandbytes into pages, from where torch has moved them."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.is_cuda:
                buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # a plain one where it is small
                state[key] = buffer.copy_(value)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what belongs to the weights by name: saved buffers and trainable parameters."""
    yield from ((name, model.get_buffer(name)) for name in _saved_buffers(model))
    yield from trainable(model)


def _saved_buffers(model: nn.Module) -> tuple[str, ...]:
    return getattr(model, "saved_buffers", ())
