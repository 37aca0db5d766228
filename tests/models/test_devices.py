"""Which device a process takes, on machines that this one is not."""

import pytest
import torch

from models.devices import own_device, runs_on_cpu


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("rank", "expected"), [(None, "cuda:0"), ("2", "cuda:2"), ("5", "cuda:1")])
def test_a_process_has_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch, rank: str | None, expected: str) -> None:
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert not runs_on_cpu()
    assert own_device() == torch.device(expected)


@pytest.mark.usefixtures("four_gpus")
def test_a_launch_may_leave_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As launch/accelerate/cpu.yaml does."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert runs_on_cpu()
    assert own_device() == torch.device("cpu")


def test_without_a_gpu_there_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert own_device() == torch.device("cpu")
