"""The SASRec encoders that LLaRA and iLoRA ship (arXiv 2312.02445, 2408.10159), read from their weights.

One block, one head, ten slots. It differs from `sasrec.py`: item vectors are not scaled, attention has no output
projection, the feed-forward layers end in a norm of their own, and a linear layer scores the items.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from data.batches import SequenceBatch

from .sequence_recommender import SequenceConfig, SequenceRecommender, with_bias

# Our modules -> theirs. Width-1 convolutions are linear maps; layer norms have torch's usual eps, 1e-5.
PUBLISHED_NAMES = {
    "attention_norm": "ln_1",
    "query": "mh_attn.linear_q",
    "key": "mh_attn.linear_k",
    "value": "mh_attn.linear_v",
    "feed_forward_norm": "ln_2",
    "inner": "feed_forward.w_1",
    "outer": "feed_forward.w_2",
    "outer_norm": "feed_forward.layer_norm",
    "final_norm": "ln_3",
}


class SASRecLLaRA(SequenceRecommender):
    """Encodes histories and scores items 1..N. It knows no dropout: the same history always gives the same state."""

    score_parameters = ("item_scores",)

    def __init__(self, num_items: int, hidden_size: int = 64, window: int = 10) -> None:
        super().__init__(SequenceConfig(hidden_size=hidden_size, window=window), num_items)
        self.position_embedding = nn.Embedding(window, hidden_size)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.inner, self.outer = (nn.Linear(hidden_size, hidden_size) for _ in range(2))
        self.outer_norm, self.final_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.item_scores = nn.Linear(hidden_size, num_items + 1)

    def states(self, batch: SequenceBatch) -> Tensor:
        """Return the state after every event, [B, L, H]; pads are on the right, where the causal mask hides them.

        Raises ValueError for histories of more than `window` events.
        """
        length = batch.items.shape[1]
        if length > self.config.window:
            raise ValueError(f"a history has {length} events, and this encoder reads the last {self.config.window}")
        slots = torch.arange(length, device=batch.items.device)
        x = self.item_embedding(batch.items) + self.position_embedding(slots)
        query_in = self.attention_norm(x)
        query, key, value = self.query(query_in), self.key(x), self.value(x)
        # The residual is the normalised query input, as in the original SASRec.
        x = F.scaled_dot_product_attention(query, key, value, is_causal=True) + query_in
        x = self.feed_forward_norm(x)
        return self.final_norm(self.outer_norm(self.outer(self.inner(x).relu()) + x))

    def operands(self, states_H: Tensor) -> tuple[Tensor, Tensor]:
        """Return operands made of the layer that scores, whose rows are not the item vectors."""
        return with_bias(states_H, self.item_scores.weight, self.item_scores.bias)


def read_sasrec_llara(path: Path, published_ids: np.ndarray | None = None) -> SASRecLLaRA:
    """Read an encoder from a safetensors file that keeps the published names.

    Their items count from 0, and the row behind the last one is padding; ours count from 1. `published_ids` [N] says
    which of theirs our items 1..N are (LastFM: the raw ids), all of them in their order when not given. Raises
    ValueError where the file holds something else or lacks an id.
    """
    published = load_file(path)
    expected = {f"{name}.{kind}" for name in (*PUBLISHED_NAMES.values(), "s_fc") for kind in ("weight", "bias")}
    expected |= {"item_embeddings.weight", "positional_embeddings.weight"}
    if published.keys() != expected:
        differing = sorted(published.keys() ^ expected)
        raise ValueError(f"{path} is no published SASRec of LLaRA: {differing[:3]} differ from what that has")
    known = len(published["s_fc.weight"])
    ids = torch.arange(known) if published_ids is None else torch.as_tensor(published_ids)
    if ids.min() < 0 or ids.max() >= known:
        raise ValueError(f"{path} has {known:,} items, numbered from 0, and {int(ids.max())} is asked for")
    positions = published["positional_embeddings.weight"]
    model = SASRecLLaRA(len(ids), positions.shape[1], len(positions))
    state = {"position_embedding.weight": positions}
    for ours, theirs in PUBLISHED_NAMES.items():
        weight, bias = published[f"{theirs}.weight"], published[f"{theirs}.bias"]
        state |= {f"{ours}.weight": weight.squeeze(-1) if weight.ndim == 3 else weight, f"{ours}.bias": bias}
    rows = {"item_embedding.weight": "item_embeddings.weight", "item_scores.weight": "s_fc.weight"}
    for ours, theirs in (rows | {"item_scores.bias": "s_fc.bias"}).items():
        table = published[theirs][ids]
        state[ours] = torch.cat([torch.zeros_like(table[:1]), table])  # padding has no vector and no score
    model.load_state_dict(state)
    return model.eval()
