"""Titles and texts that a language model writes: beam search inside the catalogue's trie, and free generation."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from .backbone import Backbone, causal_model
from .decoder import Decoder, Prefix, is_sharded, largest_anywhere, log_softmax, product, run_prefix, scoring_decoder
from .moe_lora import holding_rows
from .title_scoring import additive_mask, lacks_free_mask
from .title_trie import TitleTrie


def beam_search_titles(
    model: Backbone, input_ids: Tensor, attention_mask: Tensor, trie: TitleTrie, num_beams: int
) -> tuple[Tensor, Tensor]:
    """Titles found by beam search inside the trie, best first: (items, log-likelihoods), both [B, num_beams].

    Log-likelihoods are those of `title_log_likelihoods(constrained=True)`: softmax over the tokens that continue some
    title, so a title's beam ends where no other title goes on. Every beam ends as another title of the catalogue;
    where that has fewer, the rest is item 0 with -inf. Of items with equal titles the lowest id stands for all. With
    one beam this is greedy decoding.
    """
    decoder = scoring_decoder(model)
    trie = trie.decisions().to(input_ids.device)
    with torch.no_grad():
        prefix = run_prefix(decoder, input_ids, attention_mask)
        beams = _beams_of(decoder, prefix, num_beams, trie.max_depth)
        nodes = torch.zeros(len(input_ids), 1, dtype=torch.long, device=input_ids.device)
        states = prefix.last_state[:, None]
        scores = torch.zeros_like(states[..., 0], dtype=torch.promote_types(states.dtype, torch.float32))
        nodes, scores, origin = _extend_beams(trie, nodes, scores, states, decoder.weight, num_beams)
        for _ in range(1, trie.max_depth):
            # under ZeRO-3 a process that stopped early would leave the others waiting for its weights
            going_on = ~(trie.is_leaf(nodes) | scores.isneginf())
            if not largest_anywhere(model, int(going_on.any())):
                break
            states = beams.say(trie.token[nodes], origin)
            nodes, scores, origin = _extend_beams(trie, nodes, scores, states, decoder.weight, num_beams)
    items = trie.first_items(nodes)
    return items.masked_fill(scores.isneginf(), 0), scores


class _Beams:
    """The memory of prompts and of what their beams have said; every beam is a row with its own copy."""

    def __init__(self, decoder: Decoder, prefix: Prefix, num_beams: int) -> None:
        self.body, self.prefix, self.num_beams = decoder.body, prefix, num_beams
        self.said, self.mask = 0, prefix.mask[:, None]  # [B, beams before, tokens]

    def say(self, tokens_BK: Tensor, origin_BK: Tensor) -> Tensor:
        """The states [B, K, H] after one more token of every beam, each of which goes on from the beam `origin`."""
        batch, before, _ = self.mask.shape
        rows = torch.arange(batch, device=tokens_BK.device)[:, None] * before + origin_BK
        self.prefix.cache.batch_select_indices(rows.flatten())
        mask = self.mask.flatten(0, 1)[rows]
        self.mask = torch.cat([mask, mask.new_ones(*rows.shape, 1)], dim=-1)
        return self._run(tokens_BK.view(-1, 1), self.mask.flatten(0, 1), self.num_beams).view(*rows.shape, -1)

    def _run(self, tokens: Tensor, mask: Tensor, rows: int) -> Tensor:
        """States of tokens that are `rows` rows of every user."""
        positions = (self.prefix.length + self.said)[:, None].expand(-1, self.num_beams)
        self.said += 1
        with holding_rows(self.body, slice(None), rows):
            output = self.body(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions.reshape(tokens.shape),
                past_key_values=self.prefix.cache,
                use_cache=True,
            )
        return output.last_hidden_state


class _BeamsInARow(_Beams):
    """The same with the beams of a user in one row: each attends to the prompt, to what it has said, and to itself.

    Nothing is copied or moved, so the memory of a prompt is there once and not once a beam.
    """

    def __init__(self, decoder: Decoder, prefix: Prefix, num_beams: int) -> None:
        super().__init__(decoder, prefix, num_beams)
        self.mask = self.mask.bool()

    def say(self, tokens_BK: Tensor, origin_BK: Tensor) -> Tensor:
        said = self.mask.gather(1, origin_BK[..., None].expand(-1, -1, self.mask.shape[-1]))
        itself = torch.eye(self.num_beams, dtype=said.dtype, device=said.device).expand(len(said), -1, -1)
        self.mask = torch.cat([said, itself], dim=-1)
        return self._run(tokens_BK, additive_mask(self.mask[:, None], self.body), 1)


def _beams_of(decoder: Decoder, prefix: Prefix, num_beams: int, steps: int) -> _Beams:
    """What holds the beams of a decoder: a row a user where masks and memory are plain, else a row a beam."""
    length = prefix.mask.shape[1] + num_beams * steps
    plain = type(prefix.cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in prefix.cache.layers)
    in_a_row = plain and lacks_free_mask(decoder.body, length) is None
    return (_BeamsInARow if in_a_row else _Beams)(decoder, prefix, num_beams)


def _extend_beams(
    trie: TitleTrie, nodes: Tensor, scores: Tensor, states: Tensor, weight: Tensor, num_beams: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: nodes, scores [B, K], states [B, K, H], the head [V, H] -> nodes, scores, beams they extend.

    A beam that has ended stays as it is and competes with the others: its likelihood cannot fall any more.
    """
    batch, width = nodes.shape
    tokens, children = (part.view(batch, width, -1) for part in trie.children(nodes.flatten()))
    distinct, place = tokens.unique(return_inverse=True)
    logits = product(states, weight[distinct]).gather(-1, place)
    log_probs = log_softmax(logits.masked_fill(children == 0, -torch.inf))
    extended = (scores[:, :, None] + log_probs).masked_fill(children == 0, -torch.inf)  # NaN where none goes on
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
