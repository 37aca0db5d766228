"""Language-model backbones: the built-in `tiny`, or pre-trained weights from a folder or the hub."""

from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, cast

import torch
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerFast

from .attention import attention_of_transformers
from .dropout import LinearOfDropped, quicken
from .moe_lora import add_moe_lora, find_gate
from .pretrained import freeze_quantised, load_pretrained, load_saved_tokenizer, set_causal, set_dropout
from .tiny import TinyConfig, build_tiny, train_tiny_tokenizer

# peft and bitsandbytes take seconds to import, so functions import them: `tiny`, models without a backbone and --help
# do not wait for them.
if TYPE_CHECKING:
    from peft import PeftModel

Backbone: TypeAlias = "PreTrainedModel | PeftModel"
TINY = "tiny"

AttentionInterface.register("sdpa", attention_of_transformers)


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
    """Whether a token sees only what stands before it; by default as the backbone was trained (its config.json says).
    false makes any decoder bidirectional, as LLM2Vec does; methods that write text refuse that."""
    dropout: float | None = None
    """Dropout inside the backbone while it is trained, in its attention and wherever else its architecture has it; by
    default as its config.json says."""
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
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--backbone.dropout is {self.dropout}, but must be at least 0 and below 1")
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
    masked: bool = False,
) -> Backbone:
    """The language model on `device`; frozen and without adapter unless it is to be trained.

    Without `head` it ends with the states after its last layer, and may be an encoder. With `masked` its head fills in
    masked tokens; any other head writes, for which it must be causal.

    `seed` decides tiny's weights and the adapter's, alike on every process. Raises ValueError, naming the
    flag, for a folder or hub id that cannot be loaded, and where who sees whom is not as it must be.
    """
    model = _load_base(config, tokenizer, seed, torch.device(device), trainable, head)
    _require_direction(model, config, writes=head and not masked)
    if not trainable:
        return model.requires_grad_(False).eval()
    trained = with_lora(model, config, seed) if config.uses_lora else model.train()
    quicken(trained)
    return trained


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
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=True).train()
    if config.lora_dropout:
        _keep_masks_only(adapted, config.lora_dropout)
    return adapted


def _keep_masks_only(model: "PeftModel", dropout: float) -> None:
    """Let the backward pass of LoRA keep masks of its dropout, not each layer's dropped input."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # or each layer would keep a copy of an input that layers share
            for name, linear in layer.lora_A.items():
                layer.lora_A[name] = LinearOfDropped(cast(torch.nn.Linear, linear), dropout)
                layer.lora_dropout[name] = torch.nn.Identity()


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
        set_causal(model.config, config.causal)
        model.set_attn_implementation(config.attention)
        if config.dtype != "auto":
            model.to(dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    else:
        trained_in_full = trainable and not config.uses_lora
        dtype = "float32" if config.dtype == "auto" and trained_in_full else config.dtype
        model = load_pretrained(config, dtype, head)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    if config.quantization == "none":
        model.to(device=device)  # type: ignore[call-arg]
    else:  # bitsandbytes has placed its weights on this process's device already
        freeze_quantised(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _require_direction(model: PreTrainedModel, config: BackboneConfig, *, writes: bool) -> None:
    """Raise ValueError where a model that sees both ways is to write, or where an architecture ignores the flag."""
    if writes and getattr(model.config, "is_causal", None) is False:
        raise ValueError(
            f"--backbone.causal false, or the config.json of --backbone.name {config.name}, lets a token see what "
            "follows it, and this method writes text: pass --backbone.causal true"
        )
    if config.causal is not None and is_causal(model) != config.causal:
        raise ValueError(
            f"--backbone.causal {str(config.causal).lower()} has no effect on {model.config.model_type}, whose "
            "attention transformers does not turn round: take the flag away, or pass another --backbone.name"
        )


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
