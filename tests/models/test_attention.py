"""Attention in training on a CPU: values and gradients of the plain formula, with and without dropout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models import attention as ours
from models.attention import attention, attention_of_transformers
from models.dropout import keep_mask
from models.tiny import TinyConfig, llama_config

B, H, L, D = 5, 4, 9, 8


def formula(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, keep: Any
) -> Tensor:
    """The definition, in float64; what sees nothing is zero."""
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    p = scores.masked_fill(~seen, 0).softmax(-1) * seen
    return (p if keep is None else p * keep) @ value


def with_gradients(function: Callable[..., Tensor], parts: list[Tensor], grad: Tensor) -> list[Tensor]:
    parts = [part.detach().requires_grad_() for part in parts]
    found = function(*parts)
    found.backward(grad.to(found.dtype))
    return [found.detach(), *[part.grad for part in parts if part.grad is not None]]


def blind_row() -> Tensor:
    mask = torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[2, 0, 3] = False
    return mask


MASKS: dict[str, dict[str, Any]] = {
    "all see all": {},
    "causal": {"is_causal": True},
    "scaled": {"is_causal": True, "scale": 0.7},
    "rows with masks of their own": {"mask": blind_row()},
    "one mask": {"mask": torch.rand(L, L) < 0.7},
    "keys that are there": {"mask": (torch.arange(L) < torch.tensor([[9], [4], [1], [7], [2]]))[:, None, None]},
    "numbers that are added": {"mask": torch.randn(1, H, L, L)},
}


@pytest.mark.parametrize("pieces", [1, 2 * L * L, 2**18])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.bfloat16, 0.0), (torch.float32, 0.3), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_values_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    dtype: torch.dtype,
    dropout_p: float,
    kv_heads: int,
    pieces: int,
) -> None:
    monkeypatch.setattr(ours, "SCORES_AT_ONCE", pieces)
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, heads, L, D).to(dtype) for heads in (H, kv_heads, kv_heads))
    grad = torch.randn(B, H, L, D).to(dtype)
    keep = None
    if dropout_p:
        torch.manual_seed(7)
        drawn, share = keep_mask(torch.empty(B, H, L, L), dropout_p)
        keep = drawn.double() / share
    torch.manual_seed(7)
    with_ours = with_gradients(
        lambda *parts: attention(*parts, **options, dropout_p=dropout_p), [query, key, value], grad
    )
    mask, causal, scale = options.get("mask"), options.get("is_causal", False), options.get("scale")
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype).double()
    exact = with_gradients(
        lambda *parts: formula(*parts, mask, causal, scale, keep), [part.double() for part in (query, key, value)], grad
    )
    for found, expected in zip(with_ours, exact, strict=True):
        assert found.dtype == dtype
        bound = 1e-5 if dtype == torch.float32 else 0.01
        assert (found.double() - expected).norm() <= bound * expected.norm()


STRANGE: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "nothing asks": ({"query": (B, H, 0, D)}, {}),
    "nothing is there": ({"key": (B, H, 0, D), "value": (B, H, 0, D)}, {}),
    "one query for all": ({"query": (1, H, L, D)}, {}),
    "wide values": ({"value": (B, H, L, 2 * D)}, {}),
    "all is dropped": ({}, {"dropout_p": 1.0}),
    "long": (dict.fromkeys(("query", "key", "value"), (1, 1, 400, D)), {}),
}


@pytest.mark.parametrize(("shapes", "options"), STRANGE.values(), ids=STRANGE)
def test_strange_shapes_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, shapes: dict[str, tuple[int, ...]], options: dict[str, Any]
) -> None:
    monkeypatch.setattr(ours._Attention, "apply", None)
    parts = [
        torch.randn(shapes.get(name, (B, H, L, D)), dtype=torch.bfloat16, requires_grad=True)
        for name in ("query", "key", "value")
    ]
    assert attention(*parts, **options).equal(F.scaled_dot_product_attention(*parts, **options))


def test_transposed_layouts_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel reads them wrongly, which torch looks at before it takes it."""
    monkeypatch.setattr(ours._Attention, "apply", None)
    parts = [torch.randn(B, H, D, L, dtype=torch.bfloat16, requires_grad=True).mT for _ in range(3)]
    assert attention(*parts).equal(F.scaled_dot_product_attention(*parts))


def test_other_cases_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(B, H, L, D) for _ in range(3)]
    monkeypatch.setattr(ours._Attention, "apply", None)
    expected = F.scaled_dot_product_attention(*parts, is_causal=True)
    assert attention(*parts, is_causal=True).equal(expected), "nothing is trained"
    trained = [part.requires_grad_() for part in parts]
    assert attention(*trained, is_causal=True).equal(expected), "float32 without dropout"


def test_what_is_kept_is_no_more_than_the_fused_kernel_keeps() -> None:
    def saved(dropout_p: float, dtype: torch.dtype, function: Callable[..., Tensor]) -> int:
        kept: dict[int, int] = {}
        parts = [torch.randn(B, H, L, D, dtype=dtype, requires_grad=True) for _ in range(3)]

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function(*parts, is_causal=True, dropout_p=dropout_p)
        assert result.requires_grad
        return sum(kept.values())

    torchs = saved(0.0, torch.bfloat16, F.scaled_dot_product_attention)
    assert saved(0.0, torch.bfloat16, attention) == torchs
    assert saved(0.2, torch.bfloat16, attention) == torchs + B * H * L * L, "and a byte a probability with dropout"


@pytest.mark.parametrize("padded", [False, True])
def test_hugging_face_models_train_with_it(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    shape = llama_config(TinyConfig(hidden_size=32, layers=2), 50)
    shape.num_key_value_heads, shape._attn_implementation = 2, "sdpa"
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    ids, mask = torch.randint(50, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    if padded:
        mask[1, 8:] = 0
    used: list[int] = []
    apply = ours._Attention.apply
    monkeypatch.setattr(ours._Attention, "apply", lambda *parts: used.append(1) or apply(*parts))
    gradients = []
    for function in (attention_of_transformers, sdpa_attention_forward):
        AttentionInterface.register("sdpa", function)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask).logits
        F.cross_entropy(logits.float()[mask.bool()], ids[mask.bool()]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    AttentionInterface.register("sdpa", attention_of_transformers)
    assert len(used) == 2, "once a layer"
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()
