"""The residual gate against iLoRA's router: gates, features, gradients, and batch norm in training."""

import pytest
import torch
from torch import Tensor

from models.expert_gates import BLOCKS, CHANNELS, ExpertGate, GateConfig


@pytest.fixture
def vectors(golden):
    return golden("ilora_gate")


def settings(vectors) -> list[tuple[dict, dict[str, Tensor]]]:
    meta, every = vectors
    assert len(meta["settings"]) > 1
    return [
        (sizes, {name.removeprefix(f"{setting}."): t for name, t in every.items() if name.startswith(f"{setting}.")})
        for setting, sizes in meta["settings"].items()
    ]


def gate_with(sizes: dict, tensors: dict[str, Tensor], dtype: torch.dtype) -> ExpertGate:
    gate = ExpertGate(GateConfig("resnet"), sizes["signal_length"], sizes["experts"], num_layers=7)
    weights = {n.removeprefix("w.").removeprefix("gate."): t for n, t in tensors.items() if n.startswith("w.")}
    missing, unexpected = gate.router.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return gate.to(dtype)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("dtype", "kind", "tolerance"), [(torch.float64, "64", 1e-9), (torch.float32, "", 1e-5)])
def test_gates_and_gradients(vectors, dtype: torch.dtype, kind: str, tolerance: float) -> None:
    for sizes, tensors in settings(vectors):
        assert list(CHANNELS) == sizes["channels"]
        assert [BLOCKS] * len(CHANNELS) == sizes["blocks_per_stage"]
        gate = gate_with(sizes, tensors, dtype).eval()
        assert sum(weight.numel() for weight in gate.parameters()) == sizes["params"]
        user = tensors["in.user"].to(dtype).requires_grad_()
        gates = gate(user[:, 0])
        gates.backward(tensors["in.dgates"][:, 0].to(dtype))
        assert_close(gates, tensors[f"out{kind}.gates"][:, 0], tolerance)
        assert_close(gate.router.features(user[:, 0]), tensors[f"out{kind}.pooled"], tolerance)
        gradients = {"user": user, "conv1.weight": gate.router.conv1.weight, "gate.fc.weight": gate.router.fc.weight}
        for name, tensor in gradients.items():
            assert tensor.grad is not None
            assert_close(tensor.grad, tensors[f"grad{kind}.{name}"], tolerance)


def test_training_normalises_by_the_batch_and_moves_the_running_statistics(vectors) -> None:
    for sizes, tensors in settings(vectors):
        gate = gate_with(sizes, tensors, torch.float64).train()
        assert_close(gate(tensors["in.user"][:, 0]), tensors["train.out.gates"][:, 0], 1e-5)
        for name in ("mean", "var"):
            after = tensors[f"train.bn1.running_{name}_after"]
            assert_close(gate.get_buffer(f"router.bn1.running_{name}"), after, 1e-5)
