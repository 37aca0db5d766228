"""A causal language model as what scores titles: states, logits, and the memory of a prompt.

Everything here takes any Hugging Face causal decoder, with or without a PEFT adapter.
Prompts are left-padded: their last column is the last token of every prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from .backbone import Backbone, causal_model, without_adapter


def is_sharded(model: Module) -> bool:
    """Whether ZeRO-3 spreads the model's weights over the processes: then all must make the same forward passes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def largest_anywhere(model: Module, number: int) -> int:
    """The largest such number of any process that shares the model's weights; elsewhere the number itself."""
    if not is_sharded(model) or not torch.distributed.is_initialized():
        return number
    largest = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


class Decoder(NamedTuple):
    """The two halves of a causal language model: tokens -> states after the final norm, states -> logits."""

    body: PreTrainedModel
    head: Module

    @property
    def weight(self) -> Tensor:
        """The head's weight, [V, H]."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight


class Prefix(NamedTuple):
    """What the model knows after the prompts."""

    mask: Tensor  # [B, P]
    length: Tensor  # [B] tokens without padding
    last_state: Tensor  # [B, H] after the final norm
    cache: DynamicCache


def decoder_of(model: Backbone) -> Decoder:
    """The two halves of a backbone, adapter included; raises ValueError where there is more between them."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
        if getattr(config, name, neutral) not in (None, neutral):
            raise ValueError(
                f"{config.model_type} changes its logits behind the head ({name} = {getattr(config, name)}), "
                "which is not done here: pass another --backbone.name"
            )
    head = causal.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"{config.model_type} adds a bias to its logits, which is not done here: pass another --backbone.name"
        )
    return Decoder(cast(PreTrainedModel, causal.base_model), head)


def scoring_decoder(model: Backbone) -> Decoder:
    """`decoder_of` for scoring; raises ValueError in training mode."""
    if causal_model(model).training:
        raise ValueError("the backbone is in training mode, where dropout changes the scores: call model.eval()")
    return decoder_of(model)


def run_prefix(decoder: Decoder, prompts: Tensor, attention_mask: Tensor, use_cache: bool = True) -> Prefix:
    """Run prompts that are padded on the left: tokens [B, P], or embeddings [B, P, H] with item vectors in them."""
    output = decoder.body(
        **_input(prompts),
        attention_mask=attention_mask,
        position_ids=(attention_mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=use_cache,
    )
    return Prefix(attention_mask, attention_mask.sum(1), output.last_hidden_state[:, -1], output.past_key_values)


def run_behind(body: PreTrainedModel, start: Tensor, rows: Tensor) -> Tensor:
    """The states [B, L, H] of rows behind a start that all of them have in common, and that runs once.

    Tokens [1, P] and [B, L], or embeddings. Rows are padded on the right, if at all.
    """
    cache = body(**_input(start), use_cache=True).past_key_values
    positions = torch.arange(start.shape[1], start.shape[1] + rows.shape[1], device=rows.device)[None]
    shared = _shared_by(cache, len(rows))
    return body(**_input(rows), position_ids=positions, past_key_values=shared, use_cache=True).last_hidden_state


def _input(tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids" if tokens.ndim == 2 else "inputs_embeds": tokens}


def _shared_by(cache: DynamicCache, rows: int) -> DynamicCache:
    """The keys and values of one row as those of `rows` rows; gradients of all of them add up in the one."""
    pairs = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        pairs.append((layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)))
    return DynamicCache(pairs)


def product(states: Tensor, rows: Tensor) -> Tensor:
    """Logits [..., B, K] of states [..., B, H] and a few rows of a head [..., K, H].

    At least float32 also under autocast, whose bf16 would tie them.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):
        return states.to(dtype) @ rows.to(dtype).mT


def last_token_embeddings(
    model: Backbone, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> Tensor:
    """The base model's state after the final norm at the last token of BOS + text: [n, H] float32.

    The adapter is off and no EOS is added, as BIGRec grounds titles (arXiv 2308.08434). Equal texts run once.
    """
    distinct = list(dict.fromkeys(texts)) or [""]
    start_ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer(distinct, add_special_tokens=False)["input_ids"]
    # a tokenizer without BOS has nothing to say for an empty text: EOS is what separates texts there
    ids = [(start_ids + tokens) or [tokenizer.eos_token_id] for tokens in encoded]
    with torch.no_grad(), without_adapter(model):
        decoder = scoring_decoder(model)
        device = decoder.body.device
        embeddings = torch.empty(len(ids), decoder.body.config.get_text_config().hidden_size, device=device)
        shortest_first = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        batches = [shortest_first[start : start + batch_size] for start in range(0, len(ids), batch_size)]
        missing = largest_anywhere(model, len(batches)) - len(batches)
        for rows in batches + missing * batches[:1]:
            width = len(ids[rows[-1]])
            keep = torch.tensor([[0] * (width - len(ids[row])) + [1] * len(ids[row]) for row in rows])
            tokens = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids[row])) + ids[row] for row in rows])
            prefix = run_prefix(decoder, tokens.to(device), keep.to(device), use_cache=False)
            embeddings[rows] = prefix.last_state.float()
    row_of = {text: row for row, text in enumerate(distinct)}
    return embeddings[torch.tensor([row_of[text] for text in texts], dtype=torch.long)]


def log_softmax(logits: Tensor) -> Tensor:
    """log p over the last axis, at least in float32."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
