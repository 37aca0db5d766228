"""Titles and texts that a language model writes: beam search inside the catalogue's trie, and free generation."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .backbone import Backbone, causal_model
from .decoder import is_sharded, largest_anywhere, log_softmax, run_prefix, scoring_decoder
from .moe_lora import holding_rows
from .title_trie import TitleTrie


def beam_search_titles(
    model: Backbone, input_ids: Tensor, attention_mask: Tensor, trie: TitleTrie, num_beams: int
) -> tuple[Tensor, Tensor]:
    """Titles found by beam search inside the trie, best first: (items, log-likelihoods), both [B, num_beams].

    Every beam ends as another title of the catalogue; where that has fewer, the rest is item 0 with -inf.
    Of items with equal titles the lowest id stands for all. With one beam this is greedy decoding.
    """
    decoder = scoring_decoder(model)
    trie = trie.to(input_ids.device)
    batch = len(input_ids)
    with torch.no_grad():
        prefix = run_prefix(decoder, input_ids, attention_mask)
        mask = attention_mask.repeat_interleave(num_beams, dim=0)
        log_probs = log_softmax(decoder.head(prefix.last_state))
        nodes = torch.zeros(batch, 1, dtype=torch.long, device=input_ids.device)
        scores = log_probs.new_zeros(batch, 1)
        nodes, scores, origin = _extend_beams(trie, nodes, scores, log_probs[:, None], num_beams)
        rows = torch.arange(batch, device=input_ids.device)[:, None]
        for step in range(1, trie.max_depth):
            # under ZeRO-3 a process that stopped early would leave the others waiting for its weights
            going_on = ~(trie.is_leaf(nodes) | scores.isneginf())
            if not largest_anywhere(model, int(going_on.any())):
                break
            width = 1 if step == 1 else num_beams
            prefix.cache.batch_select_indices((rows * width + origin).flatten())
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            with holding_rows(decoder.body, slice(None), num_beams):
                output = decoder.body(
                    input_ids=trie.token[nodes].view(-1, 1),
                    attention_mask=mask,
                    position_ids=(prefix.length[:, None] + step - 1).expand(-1, num_beams).reshape(-1, 1),
                    past_key_values=prefix.cache,
                    use_cache=True,
                )
            log_probs = log_softmax(decoder.head(output.last_hidden_state[:, -1]))
            nodes, scores, origin = _extend_beams(trie, nodes, scores, log_probs.view(batch, num_beams, -1), num_beams)
    items = trie.first_items(nodes)
    return items.masked_fill(scores.isneginf(), 0), scores


def _extend_beams(
    trie: TitleTrie, nodes: Tensor, scores: Tensor, log_probs: Tensor, num_beams: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: nodes, scores [B, K], log p of next tokens [B, K, V] -> nodes, scores, beams they extend.

    A beam that has ended stays as it is and competes with the others: its likelihood cannot fall any more.
    """
    batch, width = nodes.shape
    tokens, children = (part.view(batch, width, -1) for part in trie.children(nodes.flatten()))
    extended = (scores[:, :, None] + log_probs.gather(-1, tokens)).masked_fill(children == 0, -torch.inf)
    ended = scores.masked_fill(~trie.is_leaf(nodes), -torch.inf)
    candidates = torch.cat([extended, ended[:, :, None]], dim=-1)
    reached = torch.cat([children, nodes[:, :, None]], dim=-1)
    branches = candidates.shape[-1]
    missing = max(0, num_beams - width * branches)
    best, index = F.pad(candidates.flatten(1), (0, missing), value=-torch.inf).topk(num_beams, dim=1)
    index = index.clamp(max=width * branches - 1)
    return reached.flatten(1).gather(1, index), best, index // branches


def beam_scores(items: Tensor, log_likelihoods: Tensor, trie: TitleTrie) -> Tensor:
    """Beams [B, K] as catalogue scores [B, N + 1]: found titles keep their log-likelihood, column 0 = -inf.

    All other titles tie one nat below the lowest that was found; items with equal titles get equal scores.
    """
    trie = trie.to(items.device)
    lowest = log_likelihoods.masked_fill(items == 0, torch.inf).amin(dim=1, keepdim=True)
    by_node = (lowest - 1).expand(-1, trie.num_nodes).clone()
    by_node.scatter_(1, trie.leaf_of_item[items], log_likelihoods)  # absent beams write to the root, item 0
    scores = by_node[:, trie.leaf_of_item]
    scores[:, 0] = -torch.inf
    return scores


def generate_free(
    model: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_beams: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """What unconstrained beam search writes after each prompt [B, P], up to EOS: `num_beams` texts each.

    The checkpoint's generation settings (sampling, penalties) are set aside: `generate` would take from them
    every value that the call leaves open.
    """
    causal = causal_model(model)
    checkpoint_settings = causal.generation_config
    causal.generation_config = GenerationConfig()
    try:
        with holding_rows(causal, slice(None), num_beams):  # from its first pass on
            output = cast(Any, causal).generate(  # its own type wants a protocol that no model class states
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=num_beams,
                    num_return_sequences=num_beams,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                ),
                synced_gpus=is_sharded(model) and torch.distributed.is_initialized(),
            )
    finally:
        causal.generation_config = checkpoint_settings
    texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
    return [texts[start : start + num_beams] for start in range(0, len(texts), num_beams)]
