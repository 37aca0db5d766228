"""Texts as vectors: the mean of an encoder's states over the tokens, as sentence encoders are trained."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from .backbone import Backbone
from .pooling import pool

MAX_TOKENS = 256  # all-MiniLM-L6-v2 was trained on shorter texts than its 512 positions


@torch.no_grad()
def text_vectors(
    encoder: Backbone, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 64
) -> Tensor:
    """Return [n, H] float32 vectors of length 1, the mean state of each text's tokens, special ones included."""
    shortest_first = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[tuple[list[int], Tensor]] = []
    for start in range(0, len(texts), batch_size):
        rows = shortest_first[start : start + batch_size]
        # On the right: an encoder's positions count from the first token, pads included.
        settings = {"padding": True, "padding_side": "right", "truncation": True, "max_length": MAX_TOKENS}
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", **settings).to(encoder.device)
        states = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        found.append((rows, F.normalize(pool(states, batch["attention_mask"], "mean"), dim=1)))
    vectors = torch.empty(len(texts), found[0][1].shape[1])
    for rows, part in found:
        vectors[rows] = part.cpu()
    return vectors
