"""The text retriever of UR4Rec V2: three experts look from a candidate at what is known of a user.

R rows (a user at a cut), n candidates of each, N items, S slots of a context, D width, h heads. A candidate's tensors
are [R, n, D], or [1, n, D] where all rows have the same ones: what does not depend on the user is computed once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attention
from ..dropout import Dropout
from .co_attention import CoAttention
from .memory import MemoryGate
from .v2_config import UR4RecV2Config

EXPERTS = ("user_text", "item_text", "item_vector")  # what each looks at


class Candidates(NamedTuple):
    """Items as the retriever sees them, [R or 1, n, D] each; `sentences` of their texts only for co-attention."""

    text: Tensor
    vector: Tensor
    sentences: Tensor | None = None  # [R or 1, n, Q * D], zeros where a text has fewer

    def each(self, change: Callable[[Tensor], Tensor]) -> "Candidates":
        return Candidates(*(None if tensor is None else change(tensor) for tensor in self))  # type: ignore[arg-type]

    def chosen(self, items: Tensor) -> "Candidates":
        """Return some of the catalogue, whose tensors have a row an item."""
        return self.each(lambda table: F.embedding(items, table))

    @property
    def query(self) -> Tensor:
        """What is asked, and what the answer is compared with."""
        return (self.text + self.vector) / 2


class Context(NamedTuple):
    """What an expert looks at."""

    slots: Tensor  # [R, S, D]
    real: Tensor  # [R, S] bool


class User(NamedTuple):
    """What is known of the user of each row."""

    text: Tensor  # [R, D], the mean of the profile's sentences
    contexts: tuple[Context, ...]  # one an expert


class Projection(nn.Module):
    """A text encoder's vectors in the retriever's width: [..., T] -> [..., D]."""

    def __init__(self, width: int, config: UR4RecV2Config) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.dropout = Dropout(config.dropout)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(vectors.to(self.linear.weight.dtype))))


class Expert(nn.Module):
    """x = FFN(z) or z + FFN(z), z = q + MHA(q, context, context).

    A first slot that is always there says: nothing of this fits.
    """

    def __init__(self, config: UR4RecV2Config) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.feed_forward_size or 2 * config.hidden_size
        self.num_heads, self.residual = config.num_heads, config.residual
        self.nothing = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, query_RnD: Tensor, context: Context) -> Tensor:
        rows = len(context.slots)
        slots = torch.cat([self.nothing.expand(rows, -1, -1).to(context.slots.dtype), context.slots], dim=1)
        real = F.pad(context.real, (1, 0), value=True)[:, None, None]  # [R, 1, 1, S + 1]
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(slots).chunk(2, dim=-1))
        query = split_heads(self.query(query_RnD), self.num_heads).expand(rows, -1, -1, -1)
        mixed = attention(query, key, value, real)
        x = query_RnD + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x) if self.residual else self.feed_forward(x)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[R, S, D] -> [R, h, S, D / h]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Router(nn.Module):
    """The share of each expert, [R, n, 3]: a network of two layers over the candidate and the user's text.

    Each of its four inputs has a layer norm of its own, so that what it reads of a candidate is computed once for all
    users; the published form normalises the four together.
    """

    def __init__(self, config: UR4RecV2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.of_candidate, self.of_user = nn.Linear(3 * width, width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, len(EXPERTS))

    def forward(self, candidates: Candidates, user_RD: Tensor) -> Tensor:
        parts = (candidates.query, candidates.text, candidates.vector)
        normed = [norm(part) for norm, part in zip(self.norms, parts, strict=False)]
        of_user = self.of_user(self.norms[3](user_RD))[:, None]
        return self.out(F.gelu(self.of_candidate(torch.cat(normed, dim=-1)) + of_user)).softmax(-1)


class Proxies(nn.Module):
    """r = LN(m + dropout(MHA(q = m, k = v = [m; proxies]))): every answer beside itself and the learned vectors."""

    def __init__(self, config: UR4RecV2Config) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        self.vectors = nn.Parameter(torch.randn(config.proxies, width) * width**-0.5)
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.dropout, self.norm = Dropout(config.dropout), nn.LayerNorm(width)

    def forward(self, m_RnD: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        query = self.query(m_RnD).unflatten(-1, heads)  # [R, n, h, d]
        key, value = (part.unflatten(-1, heads) for part in self.key_value(m_RnD).chunk(2, dim=-1))
        shared_key, shared_value = (
            part.unflatten(-1, heads) for part in self.key_value(self.vectors.to(m_RnD.dtype)).chunk(2, dim=-1)
        )  # [K, h, d]
        own = (query * key).sum(-1, keepdim=True)  # [R, n, h, 1]
        others = torch.einsum("rnhd,khd->rnhk", query, shared_key)
        share = (torch.cat([own, others], dim=-1) / query.shape[-1] ** 0.5).softmax(-1)
        mixed = share[..., :1] * value + torch.einsum("rnhk,khd->rnhd", share[..., 1:], shared_value)
        return self.norm(m_RnD + self.dropout(self.out(mixed.flatten(-2))))


class Retriever(nn.Module):
    """Projections, experts, router, proxies and the memory's gate; scores are cos(r, q) / temperature."""

    def __init__(self, config: UR4RecV2Config, num_items: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.item_text, self.user_text = Projection(text_width, config), Projection(text_width, config)
        self.item_vector = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
        nn.init.normal_(self.item_vector.weight, std=config.hidden_size**-0.5)
        self.ages = nn.Embedding(config.history, config.hidden_size)  # how long ago, in events
        nn.init.normal_(self.ages.weight, std=config.hidden_size**-0.5)
        self.dropout = Dropout(config.dropout)
        self.experts = nn.ModuleList(Expert(config) for _ in EXPERTS)
        self.router, self.proxies = Router(config), Proxies(config)
        self.memory_gate = MemoryGate(config.hidden_size) if config.memory.enabled else None
        self.co_attention = CoAttention(config) if config.co_attention else None

    def unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def catalogue(self, texts_NQT: Tensor) -> Candidates:
        """Return all items, [N + 1, D] each, with row 0 of padding, from the Q sentences of each text, or its whole."""
        there = (texts_NQT != 0).any(-1, keepdim=True)
        sentences = self.unit(self.item_text(texts_NQT)) * there
        text = self.unit(sentences.sum(1) / there.sum(1).clamp(min=1))
        vector = self.unit(self.item_vector.weight)
        return Candidates(text, vector, sentences.flatten(1) if self.co_attention is not None else None)

    def user(
        self, items: Candidates, history_RL: Tensor, lengths_R: Tensor, profile_RPT: Tensor, real_RP: Tensor
    ) -> User:
        """Return what rows know of their users: sentences of the profile, and the newest events, newest first."""
        sentences = self.unit(self.user_text(profile_RPT))
        text = (sentences * real_RP[..., None]).sum(1) / real_RP.sum(1, keepdim=True).clamp(min=1)
        ages = torch.arange(min(self.config.history, history_RL.shape[1]), device=history_RL.device)
        real = ages < lengths_R[:, None]  # [R, S]
        newest = history_RL.gather(1, (lengths_R[:, None] - 1 - ages).clamp(min=0))
        looked_at = (F.embedding(newest, table) for table in (items.text, items.vector))
        vectors = [self.dropout(slots + self.ages.weight[: len(ages)]) for slots in looked_at]
        return User(text, (Context(sentences, real_RP), *(Context(slots, real) for slots in vectors)))

    def answer(self, user: User, candidates: Candidates, memory_RD: Tensor | None = None) -> Tensor:
        """Return r [R, n, D] of each candidate, without or with what is remembered of the user."""
        share_Rn3 = self.router(candidates, user.text)
        looked = [
            expert(candidates.query, context) for expert, context in zip(self.experts, user.contexts, strict=True)
        ]
        m = sum(share_Rn3[..., k : k + 1] * x for k, x in enumerate(looked))
        r = self.proxies(m)
        return r if memory_RD is None or self.memory_gate is None else self.memory_gate(r, memory_RD[:, None])

    def scores(self, user: User, r_RnD: Tensor, candidates: Candidates) -> Tensor:
        """Return [R, n] float32: similarity, and the fit of preference and description where that is asked for."""
        found = self.similarity(r_RnD, candidates.query)
        if self.co_attention is None or candidates.sentences is None:
            return found
        with torch.autocast(found.device.type, enabled=False):
            return found + self.co_attention(*user.contexts[0], candidates.sentences) / self.config.temperature

    def similarity(self, r_RnD: Tensor, query_RnD: Tensor) -> Tensor:
        """Return scores [R, n] float32 of answers and queries, or of one answer a row and all queries."""
        # Under a temperature of .07 bfloat16 would be off by a tenth.
        with torch.autocast(r_RnD.device.type, enabled=False):
            r, query = self.unit(r_RnD.float()), self.unit(query_RnD.float())
            if r.shape[1] < query.shape[1]:
                products = r[:, 0] @ query[0].T if len(query) == 1 else (query @ r.transpose(1, 2))[..., 0]
            else:
                products = (r * query).sum(-1)
            return products / self.config.temperature
