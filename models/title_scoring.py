"""The exact likelihood of every catalogue title after a prompt, from one pass over the catalogue's trie."""

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .backbone import Backbone
from .decoder import Decoder, Prefix, log_softmax, product, run_prefix, scoring_decoder
from .moe_lora import holding_rows
from .title_trie import TitleTrie, TrieBlocks

BLOCK_SIZE = 128  # trie nodes in one row: attention inside a row is quadratic, the prompt's keys are copied per row
# What runs at once, by device type. A CPU computes its softmax on 1 MB of logits, which stay in its cache,
# but multiplies by the head in larger pieces, since autocast casts the head's weight anew for each.
NODES_PER_FORWARD = {"cpu": 4096, "cuda": 16384}
LOGITS_PER_MATMUL = {"cpu": 2**21, "cuda": 2**26}
LOGITS_PER_SOFTMAX = {"cpu": 2**18, "cuda": 2**26}
NUMBERS_PER_CHOICE = {"cpu": 2**21, "cuda": 2**26}  # of states beside the tokens that may follow them


def title_log_likelihoods(
    model: Backbone,
    input_ids: Tensor,
    attention_mask: Tensor,
    trie: TitleTrie,
    *,
    constrained: bool = False,
    block_size: int = BLOCK_SIZE,
    nodes_per_forward: int | None = None,
) -> Tensor:
    """Log-likelihood of every catalogue title after each prompt [B, P]: [B, N + 1] float32, column 0 = -inf.

    The sum of log p over the title's tokens and its EOS, softmax over the whole vocabulary; if `constrained`, over
    the tokens that continue some title, so that the catalogue's probabilities add up to one.

    The prompt runs once; the trie's nodes follow in rows where each attends to the prompt, its ancestors and itself,
    so a beginning that titles share is computed once. The number of forward passes depends on the batch size and the
    trie only, never on the prompts: under ZeRO-3 every process needs the same number.
    """
    decoder = scoring_decoder(model)
    require_free_mask(decoder.body, input_ids.shape[1] + trie.max_depth)
    trie = (trie.decisions() if constrained else trie).to(input_ids.device)
    blocks = trie.blocks(block_size)
    num_rows, num_slots = blocks.nodes.shape
    budget = nodes_per_forward or _for_device(NODES_PER_FORWARD, input_ids.device)
    rows_at_once = max(1, min(num_rows, budget // max(num_slots, 1)))
    users_at_once = max(1, budget // max(num_slots * rows_at_once, 1))
    with torch.no_grad():
        prefix = run_prefix(decoder, input_ids, attention_mask)
        first_tokens = trie.token[1 : trie.level_start[2]]
        if constrained:
            root = log_softmax(product(prefix.last_state, decoder.weight[first_tokens]))
        else:
            root = log_softmax(decoder.head(prefix.last_state))[:, first_tokens]
        node_log_probs = root.new_zeros(len(root), trie.num_nodes)
        node_log_probs[:, 1 : trie.level_start[2]] = root
        for user in range(0, len(input_ids), users_at_once):
            users = slice(user, user + users_at_once)
            edges = [root.new_zeros(0, len(root[users]))]
            for row in range(0, num_rows, rows_at_once):
                rows = slice(row, min(row + rows_at_once, num_rows))
                with holding_rows(decoder.body, users, rows.stop - rows.start):
                    states = _run_rows(decoder, prefix, blocks, users, rows)
                if constrained:
                    edges.append(_choice_log_probs(decoder, states, blocks, rows))
                else:
                    edges += _edge_log_probs(decoder, states, blocks, rows)
            node_log_probs[users, blocks.edge_children] = torch.cat(edges).T
    return _sum_along_paths(node_log_probs, trie)


def _run_rows(decoder: Decoder, prefix: Prefix, blocks: TrieBlocks, users: slice, rows: slice) -> Tensor:
    """States of the inner nodes that `rows` own, in depth-first order: [nodes, users, H]."""
    prompt_BP, length_B = prefix.mask[users].bool(), prefix.length[users]
    num_users, (num_rows, num_slots) = len(prompt_BP), blocks.nodes[rows].shape
    prompt = prompt_BP[:, None, None, :].expand(-1, num_rows, num_slots, -1)
    keep = torch.cat([prompt, blocks.visible[rows].expand(num_users, -1, -1, -1)], dim=-1)
    positions = length_B[:, None, None] + blocks.depths[rows] - 1
    states = decoder.body(
        input_ids=blocks.tokens[rows].repeat(num_users, 1),
        attention_mask=additive_mask(keep.flatten(0, 1)[:, None], decoder.body),
        position_ids=positions.flatten(0, 1),
        past_key_values=shared_cache(prefix.cache, users, num_rows),
        use_cache=True,
    ).last_hidden_state
    owned = blocks.slots[blocks.row_start[rows.start] : blocks.row_start[rows.stop]] - rows.start * num_slots
    return states.view(num_users, num_rows * num_slots, -1).transpose(0, 1)[owned]


def _choice_log_probs(decoder: Decoder, states_MBH: Tensor, blocks: TrieBlocks, rows: slice) -> Tensor:
    """log p of every edge that leaves the nodes owned by `rows`, among those of the same node: [edges, users].

    Their tokens' logits are all that is computed: a few a node, of the whole vocabulary.
    """
    first, end = blocks.row_start[rows.start], blocks.row_start[rows.stop]
    edges = slice(blocks.edge_start[first], blocks.edge_start[end])
    owners = blocks.edge_owners[edges] - int(first)
    at_once = max(1, _for_device(NUMBERS_PER_CHOICE, states_MBH.device) // states_MBH[0].numel())
    weight, pairs = decoder.weight, zip(owners.split(at_once), blocks.edge_tokens[edges].split(at_once), strict=True)
    logits = [product(states_MBH[owner], weight[token, None])[..., 0] for owner, token in pairs]
    return _log_softmax_of_siblings(torch.cat(logits), owners, len(states_MBH))


def _edge_log_probs(decoder: Decoder, states_MBH: Tensor, blocks: TrieBlocks, rows: slice) -> Iterator[Tensor]:
    """log p of every edge that leaves the nodes owned by `rows`, in pieces [edges, users]."""
    num_users, device = states_MBH.shape[1], states_MBH.device
    vocabulary = decoder.body.config.get_text_config().vocab_size
    nodes_per_matmul = max(1, _for_device(LOGITS_PER_MATMUL, device) // (num_users * vocabulary))
    nodes_per_softmax = max(1, _for_device(LOGITS_PER_SOFTMAX, device) // (num_users * vocabulary))
    first = int(blocks.row_start[rows.start])
    for states in states_MBH.split(nodes_per_matmul):
        logits = decoder.head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        for piece in logits.split(nodes_per_softmax):
            edges = slice(blocks.edge_start[first], blocks.edge_start[first + len(piece)])
            owners, tokens = blocks.edge_owners[edges] - first, blocks.edge_tokens[edges]
            yield log_softmax(piece)[owners, :, tokens]
            first += len(piece)


def _log_softmax_of_siblings(logits_EB: Tensor, owner_E: Tensor, num_owners: int) -> Tensor:
    """log p of each edge among the edges that leave the same node, [E, B]."""
    logits = logits_EB.to(torch.promote_types(logits_EB.dtype, torch.float32))
    owner = owner_E[:, None].expand_as(logits)
    largest = logits.new_full((num_owners, logits.shape[1]), -torch.inf).scatter_reduce(0, owner, logits, "amax")
    logits = logits - largest[owner_E]
    return logits - torch.zeros_like(largest).index_add_(0, owner_E, logits.exp()).log()[owner_E]


def _sum_along_paths(node_log_probs: Tensor, trie: TitleTrie) -> Tensor:
    """log p of each node given its parent [B, nodes] -> log p of each title [B, N + 1]."""
    totals = node_log_probs.clone()
    for start, end in zip(trie.level_start[1:-1], trie.level_start[2:], strict=True):
        totals[:, start:end] += totals[:, trie.parent[start:end]]
    scores = totals[:, trie.leaf_of_item]
    scores[:, 0] = -torch.inf
    return scores


class _SharedPrefixLayer(DynamicLayer):
    """The keys and values of a prompt, seen by every row of its user; what the rows add is not kept."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.prompt_keys, self.prompt_values, self.rows = keys, values, rows

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        # rotary embeddings leave keys in float32 under autocast; attention would cast them after this copy
        keys = self._join(self.prompt_keys, key_states, value_states.dtype)
        return keys, self._join(self.prompt_values, value_states, value_states.dtype)

    def _join(self, prompt: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:
        prompt = prompt.to(dtype)[:, None].expand(-1, self.rows, -1, -1, -1)
        return torch.cat([prompt, own.to(dtype).unflatten(0, (-1, self.rows))], dim=-2).flatten(0, 1)

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[-2]


def shared_cache(cache: DynamicCache, users: slice, rows: int) -> Cache:
    return Cache(layers=[_share(layer, users, rows) for layer in cache.layers])


def _share(layer: object, users: slice, rows: int) -> _SharedPrefixLayer:
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise ValueError(
            f"scoring titles needs every layer's keys and values, and one here is a {type(layer).__name__}. "
            "Pass a --backbone.name whose layers are all attention, or --method.scoring beam"
        )
    return _SharedPrefixLayer(layer.keys[users], layer.values[users], rows)


def require_free_mask(body: PreTrainedModel, length: int) -> None:
    """Raise ValueError where `lacks_free_mask` has something to say."""
    if (reason := lacks_free_mask(body, length)) is not None:
        raise ValueError(reason)


def lacks_free_mask(body: PreTrainedModel, length: int) -> str | None:
    """Why a decoder cannot be told, token by token, what to attend to in a row of `length`; None where it can."""
    config = body.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return (
            f"scoring titles needs a free attention mask, which {config._attn_implementation} has not: "
            "pass --backbone.attention sdpa"
        )
    takes_positions = "position_ids" in inspect.signature(type(body).forward).parameters
    if getattr(config, "alibi", False) or not takes_positions:
        return (
            f"scoring titles places tokens by position_ids, which {config.model_type} does not go by: "
            "pass another --backbone.name"
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    window = window or getattr(config, "window_size", None)  # GPT-Neo's local layers
    if window is not None and window < length:
        return f"prompt and title take {length} tokens, the backbone attends to {window}: shorten the prompt"
    return None


def _for_device(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["cuda"])


def additive_mask(keep: Tensor, body: PreTrainedModel) -> Tensor:
    """A boolean mask as what is added to attention scores: 0 to keep, the dtype's lowest value to drop."""
    device = keep.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else body.dtype
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, torch.finfo(dtype).min)
