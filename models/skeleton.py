"""Backbones without weights: every shape, type and operation of the real one, on fake tensors that hold nothing.

They are made from config.json alone, so an 8-billion-parameter model takes a second and no memory.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .backbone import TINY, Backbone, BackboneConfig, with_lora
from .pretrained import cannot_load, freeze_quantised, path_of, quantization, set_causal, set_dropout
from .tiny import llama_config

NF4_BLOCK, ABSMAX_BLOCK = 64, 256  # weights that share a scale, and scales that share one (double quantisation)
NF4_VALUES, ABSMAX_VALUES = 16, 256


def backbone_skeleton(config: BackboneConfig, head: bool = True) -> Backbone:
    """The backbone as `load_backbone` gives it for training, on torch's meta device; `as_fake` lets it run.

    Raises ValueError, naming the flag, where there is no config.json of a causal language model.
    """
    shape = _shape_of(config)
    set_causal(shape, config.causal)
    with torch.device("meta"):
        model = cast(
            PreTrainedModel,
            (AutoModelForCausalLM if head else AutoModel).from_config(
                shape, dtype=_dtype(config, shape), attn_implementation=config.attention, trust_remote_code=False
            ),
        )
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if (method := quantization(config)) is not None:
        from transformers.quantizers import AutoHfQuantizer

        AutoHfQuantizer.from_config(method).preprocess_model(model, device_map=None)
        setattr(model, f"is_loaded_in_{config.quantization}", True)
        freeze_quantised(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return with_lora(model, config, seed=0) if config.uses_lora else model.train()


def _shape_of(config: BackboneConfig) -> PreTrainedConfig:
    if config.name == TINY:
        return llama_config(config.tiny, config.tiny.vocab_size)
    path = path_of(config.name)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise cannot_load(config.name, "configuration", error) from error


def _dtype(config: BackboneConfig, shape: PreTrainedConfig) -> torch.dtype:
    """The type of the base's weights; a config.json that does not say is read as float32, the safe side."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if not config.uses_lora:
        return torch.float32
    dtype = shape.get_text_config().dtype or shape.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def as_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake CPU tensors in place of all weights and buffers; 4-bit and 8-bit layers get their packed storage."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the original too, so that its id stays taken

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, empty
        return made[id(tensor)][1]

    for module in model.modules():
        # peft's layers have these names too, but hold no weight themselves
        if "weight" in module._parameters and (pack := PACKED.get(type(module).__name__)):
            placeholder = cast(Tensor, module._parameters["weight"])
            with mode:
                module._parameters["weight"] = pack(module, placeholder.shape)
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = fake(tensor)


def _packed_4bit(layer: Any, shape: torch.Size) -> Any:
    """NF4 with double quantisation: two weights a byte, a byte of scale a block, and the scales' own scales."""
    from bitsandbytes.functional import QuantState

    storage: torch.dtype = layer.quant_storage
    blocks = math.ceil(shape.numel() / NF4_BLOCK)
    numbers = shape.numel() // (2 * storage.itemsize)
    packed: Any = nn.Parameter(torch.empty(numbers, 1, dtype=storage), requires_grad=False)
    scales = QuantState(
        absmax=torch.empty(math.ceil(blocks / ABSMAX_BLOCK)),
        code=torch.empty(ABSMAX_VALUES),
        blocksize=ABSMAX_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=shape,
        code=torch.empty(NF4_VALUES),
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.empty(()),
        state2=scales,
    )
    packed.quant_state = layer.quant_state = state
    return packed


def _packed_8bit(layer: Any, shape: torch.Size) -> Any:
    """LLM.int8: a byte a weight and a float32 scale a row."""
    packed: Any = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
    packed.CB, packed.SCB = packed.data, torch.empty(shape[0])
    # Which inputs are outliers depends on the data; the few columns that are set aside for them are not counted.
    layer.state.threshold = 0.0
    return packed


PACKED: dict[str, Callable[[Any, torch.Size], nn.Parameter]] = {
    "Linear4bit": _packed_4bit,
    "Linear8bitLt": _packed_8bit,
}


def packed_side_bytes(model: nn.Module) -> int:
    """Bytes of the scales that quantised weights need beside their storage, which are no parameters."""
    total = 0
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            scales = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            total += sum(tensor.numel() * tensor.element_size() for tensor in scales)
        if (scales_of_rows := getattr(parameter, "SCB", None)) is not None:
            total += scales_of_rows.numel() * scales_of_rows.element_size()
    return total
