"""A training step keeps to one device and never waits for it, in every method: seen without a GPU, on fake tensors.

torch's meta device stands for the GPU. Fake tensors on it refuse company from the CPU, and refuse to give up their
numbers, which on a GPU would hold the host until all that is queued has been computed.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from benchmarks.grid_rows import ROWS, save_inputs, settings
from data.loaders import TrainingLoader
from launch.config import parse
from launch.train import build, load_data
from trainers.runtime import Runtime

GPU = torch.device("meta")
# What must know numbers on the host: which texts are to be encoded, and how many rows other processes write.
WITHOUT_WAITING = {
    "dense-retrieval float32": ["--method.loss=in-batch", "--method.hard_negatives=0"],
    "dense-retrieval float32, GradCache": ["--method.loss=in-batch", "--method.hard_negatives=0"],
    "ur4rec-v2 float32": ["--method.memory.enabled=false"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder


@pytest.fixture
def meta_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meta device take autocast, as a GPU does."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def is_enabled(device: str | None = None) -> bool:
        return device != "meta" and (enabled() if device is None else enabled(device))

    def context(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **kwargs)

    monkeypatch.setattr(torch, "is_autocast_enabled", is_enabled)
    monkeypatch.setattr(torch, "autocast", context)


def on_gpu(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors on the GPU in place of all weights and buffers; shared ones stay shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, fake
                if tensor is not None:
                    tensors[name] = made[id(tensor)][1]


def as_fake(value: Any, mode: FakeTensorMode) -> Any:
    """A batch with fake tensors in place of its own, on the CPU."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: as_fake(getattr(value, field.name), mode) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return tuple(as_fake(part, mode) for part in value) if isinstance(value, tuple) else value


@pytest.mark.slow
@pytest.mark.usefixtures("meta_computes")
@pytest.mark.parametrize(
    ("row", "flag"),
    [
        *((row, None) for row in ROWS if "float32" in row),
        ("bigrec float32", "--method.objective=items"),
        ("llamarec float32", "--method.objective=published"),
        ("rankllm float32", "--method.objective=combined"),
        ("e4srec float32", "--method.loss=sampled-cross-entropy"),
    ],
)
def test_a_step_keeps_to_its_device_and_does_not_wait_for_it(
    row: str, flag: str | None, inputs: Path, tmp_path: Path
) -> None:
    flags = WITHOUT_WAITING.get(row, []) + ([] if flag is None else [flag])
    config = parse([*settings(row, inputs), *flags, f"--output={tmp_path}"])
    train, runtime = config.train, Runtime("fp32", [], tmp_path, config.train.timeout_seconds)
    catalog, parts = load_data(config, runtime)
    set_seed(0)
    built = build(config, catalog, parts, runtime)
    rows = train.micro_batch_size
    loader = TrainingLoader(built.training(), train.batch_size, rows, runtime.share, train.seed, train.group_by_length)
    batch = next(iter(next(iter(loader.epoch(0, 0))).batches))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_gpu(built.model, mode)
    with mode:
        loss = built.model.train()(as_fake(batch, mode).to(GPU))
        loss.total.backward()
    assert loss.total.device == GPU
    gradients = [weight.grad for weight in built.model.parameters() if weight.grad is not None]
    assert gradients
    assert all(gradient.device == GPU for gradient in gradients)


def test_what_would_hold_the_host_is_seen() -> None:
    with FakeTensorMode():
        values = torch.zeros(3, device=GPU)
        with pytest.raises(RuntimeError, match="same device"):
            values + torch.zeros(3)
        with pytest.raises(DataDependentOutputException):
            values.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            values[values > 0]
