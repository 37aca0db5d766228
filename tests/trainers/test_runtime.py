"""The Accelerator as this project sets it up: precision, threads, and refusals instead of surprises."""

import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from trainers import runtime as runtime_module
from trainers.config import TrainConfig
from trainers.optimizer import build_optimizer
from trainers.runtime import HostCopy, Runtime, best_precision, leave

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "fast_on_cpu", "native_on_gpu", "expected"),
    [
        (CPU, True, True, "bf16"),
        (CPU, False, True, "fp32"),  # bfloat16 without units for it is many times slower than float32
        (CUDA, False, True, "bf16"),
        (CUDA, True, False, "fp16"),  # an older GPU, which would only emulate bfloat16
        (torch.device("mps"), True, True, "fp32"),
    ],
)
def test_auto_takes_what_is_fast_there(monkeypatch, device, fast_on_cpu, native_on_gpu, expected) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast_on_cpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native_on_gpu)
    assert best_precision(device) == expected


def test_under_deepspeed_auto_is_never_fp16(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert best_precision(CUDA, uses_deepspeed=True) == "fp32"


def test_a_launch_on_the_cpu_leaves_an_accelerator_alone(monkeypatch) -> None:
    """As launch/accelerate/cpu.yaml asks for."""
    asked: list[bool] = []
    partial_state = runtime_module.PartialState
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(
        runtime_module, "PartialState", lambda cpu, **rest: (asked.append(cpu), partial_state(cpu, **rest))[1]
    )
    assert Runtime("fp32").device == CPU
    assert asked == [True]


class Product(nn.Module):
    """Says in which type a matrix product is done."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> list[torch.dtype]:
        return [self.layer(x).dtype]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_reaches_the_model(precision: str, dtype: torch.dtype) -> None:
    own = Runtime(precision)
    model = Product()
    prepared, _ = own.prepare(model, torch.optim.SGD(model.parameters()))
    assert prepared(torch.ones(1, 4)) == [dtype]
    assert own.unwrap(prepared)(torch.ones(1, 4)) == [dtype], "evaluation keeps it"
    assert own.scaler is None
    assert model.layer.weight.dtype == torch.float32, "weights and optimizer stay in float32"


def test_parts_are_clipped_each_to_its_own_norm() -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("tower", "head", "free", "rest")})
    config = TrainConfig(max_grad_norm=2.0, max_grad_norms={"tower": 0.5, "head": 50.0, "free": 0.0})
    own = Runtime("fp32")
    prepared, _ = own.prepare(model, build_optimizer(model, config), max_grad_norm=config.max_grad_norm)
    sum(10 * p.sum() for p in model.parameters()).backward()
    each = 10 * 8**0.5  # of 6 weights and 2 biases
    assert own.clip_grad_norm(prepared).item() == pytest.approx(2 * each), "the norm of all, before clipping"
    norms = {name: torch.cat([p.grad.flatten() for p in part.parameters()]).norm() for name, part in model.items()}
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(
        {"tower": 0.5, "head": each, "free": each, "rest": 2.0}, rel=1e-5
    )


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (2, 4), (3, 2), (99, 1)])
def test_processes_share_the_cores(monkeypatch, processes: int, threads: int) -> None:
    """`accelerate launch` leaves one thread a process on CPU, whatever the machine has."""
    used: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(runtime_module, "_end_with_launcher", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    Runtime("fp32")
    assert used == [threads]


def test_without_a_launcher_threads_stay_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("threads were changed"))
    Runtime("fp32")


def test_small_numbers_come_to_the_host() -> None:
    assert HostCopy(torch.tensor([3, 0, 2])).read() == [3, 0, 2]


def test_a_process_that_was_to_be_one_of_several_does_not_train_alone(monkeypatch) -> None:
    """As when several hosts are launched without deepspeed_multinode_launcher: standard."""
    monkeypatch.setenv("SHARDREC_WORLD_SIZE", "16")
    with pytest.raises(RuntimeError, match=r"16 processes were asked for, but 1 joined.*multinode_launcher: standard"):
        Runtime("fp32")


def test_the_deepspeed_launcher_must_name_a_configuration(monkeypatch) -> None:
    """It is called for ZeRO, and would give DDP."""
    monkeypatch.setenv("CROSS_SIZE", "2")
    with pytest.raises(RuntimeError, match="export ACCELERATE_USE_DEEPSPEED=true and ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        Runtime("fp32")


def test_a_configuration_that_turns_deepspeed_off_is_refused(monkeypatch) -> None:
    """With use_cpu in its configuration, Accelerate would run plain DDP without a word."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(RuntimeError, match=r"asks for DeepSpeed, but Accelerate runs MULTI_CPU.*use_cpu"):
        Runtime("fp32")


@pytest.mark.parametrize(("processes", "at_once"), [(1, []), (2, [143])])
def test_one_of_several_processes_leaves_without_taking_python_apart(monkeypatch, processes: int, at_once) -> None:
    """Gloo's threads abort an interpreter that is going away: a finished job would count as failed."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit) as end:
        leave(143)
    assert left == at_once
    assert end.value.code == 143
