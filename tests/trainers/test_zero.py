"""What DeepSpeed changes in a process, and what must stay as it is anywhere else."""

import pytest
import torch
from torch import nn

from trainers.zero import round_once_without_gradients


def test_layers_under_stage_3_compute_as_in_one_process_where_no_gradient_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    layer, rows = nn.Linear(32, 64), torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(rows).detach()
        monkeypatch.setattr(nn.functional, "linear", zero3_linear_wrap)
        assert not layer(rows).equal(plain), "it rounds twice, or this test says nothing"
        round_once_without_gradients()
        with torch.no_grad():
            assert layer(rows).equal(plain)
        with_gradient = layer(rows)
    assert with_gradient.grad_fn is not None
    assert "ZeroStage3" in with_gradient.grad_fn.name(), "no whole weight is kept for the backward pass"
    with_gradient.sum().backward()
    assert layer.weight.grad is not None


def test_a_process_without_stage_3_keeps_its_layers() -> None:
    before = nn.functional.linear
    round_once_without_gradients()
    assert nn.functional.linear is before
