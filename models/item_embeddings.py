"""Item tables inside a language model: what an item looks like as an input, and what a state is matched with.

A table of vectors [N + 1, D] from anywhere (random, an ID recommender's, the mean of a title's token embeddings),
learned or fixed, perhaps projected to the backbone's width H, and scaled to the norm of its token embeddings.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.title_tokens import TokenTable

from . import losses
from .backbone import Backbone, causal_model

START_SCALE = 20.0  # of cosines, learned from there: sharp enough for a softmax over thousands of items
Source = Literal["auto", "random", "sasrec", "title", "encoder"]
Projector = Literal["auto", "none", "linear", "mlp"]


Match = Literal["dot", "cosine"]


@dataclass
class ItemTableConfig:
    """Where item vectors come from, and what of them is trained."""

    source: Source = "auto"
    """random; sasrec: the item table of --method.sasrec; title: the mean token embedding of each title; encoder: what
    the text encoder --method.encoder makes of each title. auto: sasrec where it is given, else title where the
    catalogue has titles, else random."""
    projector: Projector = "auto"
    """Map to the backbone's width: none, linear (E4SRec) or mlp (linear, GELU, linear: LLaRA). auto: linear where
    the widths differ."""
    train_table: bool = True
    """Learn the vectors; false keeps them as they are. (--train.frozen_epochs keeps them for a while.)"""
    scale: Literal["backbone", "none"] = "backbone"
    """backbone: the mean norm of what the model reads is that of its token embeddings; none: as the vectors come."""


class ProjectedTable(nn.Module):
    """Vectors of items 1..N, row 0 for padding; `forward` gives them as the backbone reads them."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """The vectors before projection, [N + 1, D]."""

    def forward(self, items: Tensor) -> Tensor:
        """Item ids of any shape -> [..., H]."""
        return self.projector(F.embedding(items, self.table))

    def operands(self, states_TH: Tensor, items: slice | Tensor = slice(1, None)) -> tuple[Tensor, Tensor]:
        """Return [T, D] and [n, D] whose products are the scores of `items`, all of them by default.

        A linear projector works on the states, which are fewer than the catalogue: h (E W)^T = (h W^T) E^T. Its bias
        adds the same to every item of a state, which changes no softmax and no rank.
        """
        rows = self.table[items]
        if isinstance(self.projector, nn.Linear):
            return F.linear(states_TH, self.projector.weight.T), rows
        return states_TH, self.projector(rows)

    def vectors(self) -> Tensor:
        """Return [N + 1, H], what the model reads for each item; row 0 means nothing."""
        return self.projector(self.table)


class ItemTable(ProjectedTable):
    """A table of its own, learned or fixed."""

    fixed: Tensor

    def __init__(
        self, table_ND: Tensor, config: ItemTableConfig, width: int, norm: float, flag: Literal["input", "output"]
    ) -> None:
        """`width` is the backbone's, `norm` the mean norm of its token embeddings, `flag` what the vectors are for.

        Raises ValueError where the table is of another width and nothing maps it.
        """
        table_ND = table_ND.float()
        own_width = table_ND.shape[1]
        kind = config.projector
        if kind == "auto":
            kind = "none" if own_width == width else "linear"
        if kind == "none" and own_width != width:
            raise ValueError(
                f"item vectors are {own_width} wide and the backbone {width}: pass --method.{flag}.projector linear or "
                "mlp, or vectors of its width"
            )
        projector = make_projector(kind, own_width, width)
        if flag == "output" and isinstance(projector, nn.Linear):
            projector = nn.Linear(own_width, width, bias=False)  # it would change no score: see `operands`
        super().__init__(projector)
        if config.scale == "backbone":
            table_ND = scaled(table_ND, projector, norm)
        self.learned = nn.Embedding.from_pretrained(table_ND, freeze=False) if config.train_table else None
        self.register_buffer("fixed", None if config.train_table else table_ND)

    @property
    def table(self) -> Tensor:
        return self.fixed if self.learned is None else self.learned.weight


@torch.no_grad()
def scaled(table_ND: Tensor, projector: nn.Module, norm: float) -> Tensor:
    """Bring the mean norm of the projected rows 1..N to `norm`, by the last linear map where there is one.

    Returns the table, which is scaled itself where no map is.
    """
    factor = norm / projector(table_ND[1:]).norm(dim=1).mean().clamp(min=1e-12)
    linear_maps = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not linear_maps:
        return table_ND * factor
    linear_maps[-1].weight *= factor
    return table_ND


@torch.no_grad()
def mean_token_embeddings(backbone: Backbone, tokens: TokenTable) -> Tensor:
    """Return [N + 1, H] float32: the mean input embedding of each sequence's tokens; zero for an empty one."""
    weight = causal_model(backbone).get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    ids, starts = torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.offsets[:-1])
    used, rows = ids.unique(return_inverse=True)  # a vocabulary in float32 may not fit beside a 4-bit base
    vectors = weight.index_select(0, used.to(weight.device)).float()
    table = F.embedding_bag(rows.to(weight.device), vectors, starts.to(weight.device), mode="mean")
    table[0] = 0
    return table


def put_vectors(embeds_BLH: Tensor, slots_S: Tensor, vectors_SH: Tensor) -> Tensor:
    """Return embeddings in which the vectors stand at their slots; no token's embedding there gets a gradient."""
    return embeds_BLH.flatten(0, 1).index_copy(0, slots_S, vectors_SH.to(embeds_BLH.dtype)).view_as(embeds_BLH)


def make_projector(kind: str, width: int, out_width: int) -> nn.Module:
    """A map [..., width] -> [..., out_width]: none, linear, or mlp with an exact GELU; biases start at zero."""
    if kind == "none":
        return nn.Identity()
    layers = [nn.Linear(width, out_width)]
    if kind == "mlp":
        layers.append(nn.Linear(out_width, out_width))
    for layer in layers:
        nn.init.zeros_(layer.bias)
    return layers[0] if kind == "linear" else nn.Sequential(layers[0], nn.GELU(), layers[1])


def identity_map(width: int) -> nn.Linear:
    """A linear map [..., width] -> [..., width] that learns from the identity on."""
    linear = nn.Linear(width, width)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class ItemMatcher(nn.Module):
    """Scores of the catalogue: products of a state with every item's vector, or scaled cosines."""

    def __init__(self, table: ProjectedTable, match: Match = "dot", state_projector: nn.Module | None = None) -> None:
        """`state_projector` maps states before they are matched."""
        super().__init__()
        self.table, self.match = table, match
        self.state_projector = state_projector or nn.Identity()
        # [1], since ZeRO cannot send a number without a shape
        self.log_scale = nn.Parameter(torch.tensor([START_SCALE]).log()) if match == "cosine" else None

    def operands(self, states_TH: Tensor, items: slice | Tensor = slice(1, None)) -> tuple[Tensor, Tensor]:
        """Return [T, D] and [n, D] whose products are the logits of `items`."""
        states = self.state_projector(states_TH)
        if self.log_scale is None:
            return self.table.operands(states, items)
        vectors = self.table.projector(self.table.table[items])
        scale = self.log_scale.exp().float()
        return F.normalize(states.float(), dim=1) * scale, F.normalize(vectors.float(), dim=1)

    def loss(self, states_TH: Tensor, target_T: Tensor, *, with_padding: bool = False) -> Tensor:
        """Return the summed cross-entropy over the catalogue; `with_padding` makes item 0 a class, as E4SRec's code."""
        first = 0 if with_padding else 1
        query, table = self.operands(states_TH, slice(first, None))
        return losses.full_cross_entropy(query, table, target_T - first)

    def sampled_loss(self, states_TH: Tensor, target_T: Tensor, negative_K: Tensor, log_expected_K: Tensor) -> Tensor:
        """Return the summed softmax loss over target and shared negatives, corrected for how they were drawn.

        `log_expected_K` is the log of how often all draws together are expected to bring each: divided by it, the
        negatives' sum of exponentials estimates the one over the catalogue without bias, and so with its size.
        """
        items = torch.cat([target_T, negative_K])
        query, vectors = self.operands(states_TH, items)
        positive, negative = vectors.split([len(target_T), len(negative_K)])
        hits = negative_K == target_T[:, None]
        products = (query * positive).sum(-1), query @ negative.T
        return losses.sampled_cross_entropy(*products, hits, log_expected_K)

    def forward(self, states_BH: Tensor) -> Tensor:
        """Return scores [B, N + 1] float32."""
        with torch.autocast(states_BH.device.type, enabled=False):
            query, table = self.operands(states_BH.float(), slice(None))
            scores = query @ table.float().T
        scores[:, 0] = -torch.inf
        return scores
