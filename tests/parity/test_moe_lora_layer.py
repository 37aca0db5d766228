"""The gated low-rank layer against iLoRA's: outputs and gradients in float64 and float32."""

import pytest
import torch
from torch import Tensor, nn

from models.moe_lora import ActiveGate, MoELoRALinear


@pytest.fixture
def vectors(golden):
    return golden("moe_lora_layer")


def layer_of(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> MoELoRALinear:
    base = nn.Linear(sizes["d_in"], sizes["d_out"], bias=False).requires_grad_(False)
    gate = ActiveGate(1, sizes["experts"])
    scale = sizes["lora_alpha"] / (sizes["rank_total"] // sizes["experts"])
    assert scale == sizes["scaling"]
    layer = MoELoRALinear(base, gate, 0, sizes["rank_total"], scale, dropout=0.0)
    with torch.no_grad():
        for weight, name in ((base.weight, "W"), (layer.lora_A, "A"), (layer.lora_B, "B")):
            weight.copy_(tensors[f"w.{name}"])
    return layer.to(dtype)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "kind", "tolerance"), [(torch.float64, "64", 1e-9), (torch.float32, "", 1e-5)])
def test_outputs_and_gradients(vectors, dtype: torch.dtype, kind: str, tolerance: float) -> None:
    meta, every = vectors
    assert len(meta["settings"]) > 1
    for setting, sizes in meta["settings"].items():
        tensors = {name.removeprefix(f"{setting}."): t for name, t in every.items() if name.startswith(f"{setting}.")}
        layer = layer_of(sizes, tensors, dtype)
        x = tensors["in.x"].to(dtype).requires_grad_()
        gate = tensors["in.gate"].to(dtype).requires_grad_()
        with layer.gate.use(gate[:, 0]):
            y = layer(x)
        y.backward(tensors["in.dy"].to(dtype))
        assert_close(y, tensors[f"out{kind}.y"], tolerance)
        gradients = {"x": x, "gate": gate, "A": layer.lora_A, "B": layer.lora_B}
        for name, tensor in gradients.items():
            assert tensor.grad is not None
            assert_close(tensor.grad, tensors[f"grad{kind}.{name}"], tolerance)
        assert layer.base_layer.weight.grad is None
        with layer.gate.use(torch.zeros_like(gate[:, 0])):
            assert_close(layer(x), tensors[f"out{kind}.y_base"], tolerance)
