"""One micro-batch of training on fake tensors: what it would keep in memory, without weights, data or a GPU.

The real model, the real loss and the real backward pass run; only the numbers are missing. So every architecture and
every setting is forecast by its own code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal
from unittest.mock import patch

import bitsandbytes.autograd._functions as bitsandbytes
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils

from models import dropout
from models.backbone import describe
from models.skeleton import as_fake, packed_side_bytes
from trainers.live_bytes import LiveBytes

from .config import RunConfig
from .methods import METHODS
from .skeletons.base import Skeleton

Device = Literal["cuda", "cpu"]
PERSISTENT_ELEMENTS = 100_000  # ZeRO-3 keeps parameters up to this size whole on every GPU


@dataclass(frozen=True)
class Rehearsal:
    """What one micro-batch of one process needs; all sizes in bytes."""

    parameters: int  # a number, as the next one
    trainable_parameters: int
    frozen_bytes: int  # as they are stored, buffers and the scales of quantised weights included
    trainable_bytes: int
    unsharded_bytes: int  # of the frozen ones, those that are no parameters: ZeRO-3 leaves them whole
    uncut_bytes: int  # of 8-bit weights: bitsandbytes holds on to them whole while ZeRO-3 cuts its parameters
    persistent_bytes: int  # of parameters small enough for ZeRO-3 to keep them whole
    largest_module_bytes: int  # the largest parameters of one module, which ZeRO-3 gathers at once
    stored_elements: int  # as ZeRO-3 counts them: numbers in storage, of which a packed one holds several weights
    activation_bytes: int  # alive when the forward pass ends
    peak_bytes: int  # the most that is alive beside weights and accumulated gradients
    peak_with_gradients: int  # the same with gradients, of a step of one micro-batch that starts without any
    logits_bytes: int  # the most that is alive of tensors as wide as the vocabulary or the catalogue
    flops: int  # a number: of matrix products and attention, forward, backward, and what checkpointing computes again
    left_out: str = ""  # what of the model is not counted, in words

    @property
    def weight_bytes(self) -> int:
        return self.frozen_bytes + self.trainable_bytes


def rehearse(config: RunConfig, num_items: int, length: int, micro_batch: int, device: Device = "cuda") -> Rehearsal:
    """Run forward and backward of `micro_batch` rows of `length` tokens (or events), every one with a label.

    `device` decides which kernels are imitated; --train.precision auto is bf16 on both. Raises ValueError, naming the
    flag, for a backbone whose config.json cannot be read, and for a model that trains next to nothing.
    """
    skeleton = make_skeleton(config, num_items)
    precision = config.train.precision
    autocast = {"fp32": None, "fp16": torch.float16}.get(precision, torch.bfloat16)
    mode = FakeTensorMode()
    as_fake(skeleton.model, mode)
    with mode:
        batch = skeleton.batch(micro_batch, length)
    return _measure(skeleton, batch, mode, autocast, device)


def make_skeleton(config: RunConfig, num_items: int) -> Skeleton:
    """Return the model that `config` names, for a catalogue of `num_items`; raise ValueError where it has none."""
    require_forecast(config)
    make = METHODS[config.model].skeleton
    assert make is not None
    return make(config.method, config.backbone, num_items)


def require_forecast(config: RunConfig) -> None:
    """Raise ValueError for a model of which no forecast is made."""
    if METHODS[config.model].skeleton is None:
        raise ValueError(
            f"there is no forecast of --model {config.model}, which trains little beside the runs that it begins with: "
            "plan those instead"
        )


def _measure(
    skeleton: Skeleton, batch: Any, mode: FakeTensorMode, autocast: torch.dtype | None, device: Device
) -> Rehearsal:
    model = skeleton.model
    weights = [*model.parameters(), *model.buffers()]
    live = LiveBytes(
        [*weights, *(value for value in vars(batch).values() if isinstance(value, Tensor))], skeleton.classes
    )
    size = _weights(model)  # before bitsandbytes moves its scales
    live.watch_gradients(p for p in model.parameters() if p.requires_grad)
    count = FlopCount()
    with mode, as_on(device, autocast), live, count:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            total = model(batch).total
        held = live.now
        total.backward()
    return Rehearsal(
        **size,
        activation_bytes=held,
        peak_bytes=live.peak,
        peak_with_gradients=live.peak_with_gradients,
        logits_bytes=live.peak_logits,
        flops=count.flops,
        left_out=skeleton.left_out,
    )


class FlopCount(TorchDispatchMode):
    """Adds up the FLOPs of matrix products and attention.

    torch's FlopCounterMode has hooks in every module, which keep tensors alive that would be gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> int:
    """Two products of queries with keys or values, [B, h, S, d] each; causal ones need half of the pairs."""
    pairs = prod(query.shape[:3]) * key.shape[-2] / (2 if is_causal else 1)
    return int(2 * pairs * (key.shape[-1] + value.shape[-1]))


def _attention_backward_flops(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    **_: Any,
) -> int:
    """The four products of the gradients; what the fused kernel computes again is not counted."""
    return 2 * _attention_flops(query, key, value, is_causal=is_causal)


def _product_with_4_bits_flops(rows: Tensor, packed: Tensor, shape: list[int], *_: Any, **__: Any) -> int:
    return 2 * rows.numel() * shape[0]


def _product_with_8_bits_flops(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * rows.numel() * len(weight)


# torch has formulas for its own products and for CUDA's attention; these are bitsandbytes' and the fake attention's.
FLOPS: dict[Any, Any] = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.bitsandbytes.gemm_4bit: _product_with_4_bits_flops,
    torch.ops.bitsandbytes.int8_scaled_mm: _product_with_8_bits_flops,
}


def _weights(model: nn.Module) -> dict[str, int]:
    size = describe(model)
    parameters = list(model.parameters())
    trainable = sum(_bytes(p) for p in parameters if p.requires_grad)
    unsharded = sum(map(_bytes, model.buffers())) + packed_side_bytes(model)
    return {
        "parameters": size["parameters"],
        "trainable_parameters": size["trainable_parameters"],
        "trainable_bytes": trainable,
        "frozen_bytes": sum(map(_bytes, parameters)) - trainable + unsharded,
        "unsharded_bytes": unsharded,
        "uncut_bytes": sum(_bytes(held) for p in parameters if (held := getattr(p, "CB", None)) is not None),
        "persistent_bytes": sum(_bytes(p) for p in parameters if p.numel() <= PERSISTENT_ELEMENTS),
        "largest_module_bytes": max(sum(map(_bytes, m.parameters(recurse=False))) for m in model.modules()),
        "stored_elements": sum(p.numel() for p in parameters),
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def as_on(device: Device, autocast: torch.dtype | None) -> Iterator[None]:
    """Let fake CPU tensors keep what a real `device` keeps, in a forward pass of whole unpadded sequences."""
    # What transformers finds by looking at the numbers, which are not there: no row packs several sequences.
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None):
        if device == "cpu":
            yield
            return
        # Patches rather than a mode, for checkpointing's recomputation does not see the modes around it.
        with (
            _cuda_autocast(autocast is not None),  # peft asks whether autocast is on for CUDA
            patch.object(dropout, "QUICK", frozenset()),
            patch.object(F, "dropout", _dropout),
            patch.object(F, "scaled_dot_product_attention", _attention),
            patch.object(bitsandbytes, "MatMul8bitFp", bitsandbytes.MatMul8bitLt),
        ):
            yield


@contextmanager
def _cuda_autocast(enabled: bool) -> Iterator[None]:
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


# Where CUDA's kernels keep something else for the backward pass than the CPU's do:


def _dropout(values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keep a mask of bytes; the CPU keeps the factors in the values' own type."""
    return torch.native_dropout(values, p, training)[0] if training and p > 0 else values


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Run the fused kernel, whose dropout costs nothing; or the plain one where CUDA has no fused one."""
    options["dropout_p"] = 0.0
    attend = partial(torch._C._nn.scaled_dot_product_attention, query, key, value, **options)
    # In float32 only the memory-efficient kernel is left, and that one does not share keys between heads.
    if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and options.get("enable_gqa"):
        with sdpa_kernel(SDPBackend.MATH):
            return attend()
    return attend()
