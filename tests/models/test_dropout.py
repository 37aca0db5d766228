"""Dropout on a CPU: what torch's does, from other random numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.backbone import BackboneConfig, load_backbone, load_tokenizer, with_lora
from models.dropout import Dropout, LinearOfDropped, dropout, keep_mask, quicken
from models.tiny import TinyConfig, build_tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1000, 999), (7,), (3, 1, 5), (0, 4)])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_what_is_kept_is_scaled_and_the_rest_is_zero(p: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=dtype).abs() + 1
    found = dropout(values, p)
    assert found.shape == values.shape
    assert found.dtype == dtype
    kept = found != 0
    torch.testing.assert_close(found[kept].float(), values[kept].float() / (1 - p), rtol=1e-2, atol=0)
    if values.numel() > 10**5:
        share = kept.float().mean()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / values.numel()) ** 0.5, "five standard errors"
        neighbours = kept[:, 1:] & kept[:, :-1]
        assert abs(neighbours.float().mean() - (1 - p) ** 2) < 0.005, "neighbours are independent"


def test_expectations_are_exact_where_the_probability_is_rounded() -> None:
    torch.manual_seed(0)
    p = 1.4 / 2**16
    found = dropout(torch.ones(2**20), p)
    assert found.max() == pytest.approx(1 / (1 - 1 / 2**16), rel=1e-7)


def test_gradients_pass_through_what_is_kept() -> None:
    torch.manual_seed(0)
    values = torch.randn(50, 30, requires_grad=True)
    found = dropout(values, 0.3)
    found.backward(torch.ones_like(found))
    torch.testing.assert_close(values.grad, (found / values).detach())


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_a_mask_keeps_what_dropout_would(p: float) -> None:
    values = torch.randn(300, 1001)
    torch.manual_seed(5)
    found = dropout(values, p)
    torch.manual_seed(5)
    keep, share = keep_mask(values, p)
    assert keep.bool().equal(found != 0)
    torch.testing.assert_close(found, values * keep / share)
    assert share == pytest.approx(1 - p, abs=2**-16)


def test_masks_follow_from_the_seed_and_change() -> None:
    ones = torch.ones(100)
    torch.manual_seed(3)
    first, second = dropout(ones, 0.5), dropout(ones, 0.5)
    torch.manual_seed(3)
    assert dropout(ones, 0.5).equal(first)
    assert not first.equal(second)


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (1.0, True), (1e-9, True)])
def test_what_needs_no_mask_is_left_to_torch(p: float, training: bool) -> None:
    values = torch.randn(20)
    assert dropout(values, p, training).equal(F.dropout(values, p, training))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_layer_of_dropped_input_is_dropout_and_the_layer(dtype: torch.dtype, autocast: bool) -> None:
    linear = nn.Linear(60, 8, bias=False)
    layers = [LinearOfDropped(linear, 0.3), lambda x: F.linear(Dropout(0.3)(x).to(linear.weight.dtype), linear.weight)]
    data, found = torch.randn(4, 50, 60).to(dtype), []
    for layer in layers:
        torch.manual_seed(1)
        values = data.clone().requires_grad_()
        linear.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = layer(values)
        out.float().square().sum().backward()
        found.append((out, values.grad, linear.weight.grad))
    close = 2e-2 if autocast or dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < close * theirs.norm()


def test_a_linear_layer_of_dropped_input_drops_nothing_in_evaluation() -> None:
    linear, values = nn.Linear(6, 3, bias=False), torch.randn(5, 6)
    assert LinearOfDropped(linear, 0.5).eval()(values).equal(linear(values))


def test_layers_of_one_input_keep_it_once_and_a_byte_of_mask_a_number_each() -> None:
    values = torch.randn(100, 64, requires_grad=True).clone()
    layers = [LinearOfDropped(nn.Linear(64, 2, bias=False), 0.3) for _ in range(3)]
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
        [layer(values) for layer in layers]
    assert sum(kept.values()) == values.nbytes + 3 * values.numel() + 3 * layers[0].weight.nbytes


def test_a_lora_layer_keeps_masks_only() -> None:
    config = BackboneConfig(name="any", adapter="lora", lora_dropout=0.2)
    tokenizer = load_tokenizer(BackboneConfig(), ["a title"])
    tiny = build_tiny(TinyConfig(hidden_size=32, layers=1, heads=2, vocab_size=512), tokenizer, seed=0)
    model = with_lora(tiny, config, seed=0)
    adapted = [module for module in model.modules() if isinstance(module, LinearOfDropped)]
    assert len(adapted) == 7, "q, k, v, o, gate, up, down"
    assert {layer.p for layer in adapted} == {0.2}
    assert not [module for module in model.modules() if isinstance(module, nn.Dropout)], "no second dropout"
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("q_proj.lora_A.default.weight") for name in names), "PEFT's own names"


def test_a_trained_backbone_drops_quickly() -> None:
    config = BackboneConfig(name="minilm", dropout=0.2)
    try:
        tokenizer = load_tokenizer(config, [])
    except ValueError as error:
        pytest.skip(str(error))
    model = load_backbone(config, tokenizer, seed=0, device="cpu", trainable=True, head=False)
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert layers
    quick = {type(layer) for layer in layers}
    assert quick == {Dropout}
    assert {layer.p for layer in layers} <= {0.2, config.lora_dropout}


def test_other_dropouts_of_a_model_stay() -> None:
    adapters = nn.ModuleDict({"default": nn.Dropout(0.1)})
    model = nn.Sequential(nn.Dropout(0.3), nn.Sequential(nn.Dropout1d(0.4)), adapters)
    quicken(model)
    assert [type(m) for m in model.modules() if "Drop" in type(m).__name__] == [Dropout, nn.Dropout1d, Dropout]
