"""E4SRec: a language model reads item vectors between pieces of text, and its state scores the whole catalogue.

Source: Li et al., "E4SRec: An Elegant Effective Efficient Extensible Solution of Large Language Models for Sequential
Recommendation", arXiv 2312.02443. Tables, projectors and heads are choices here; the published ones are among them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.item_prompts import ItemPromptBatch, ItemPromptSettings

from .backbone import Backbone, causal_model
from .base import Loss, Recommender
from .decoder import run_behind
from .dropout import dropout
from .item_embeddings import (
    ItemMatcher,
    ItemTable,
    ItemTableConfig,
    Match,
    ProjectedTable,
    identity_map,
    put_vectors,
)


@dataclass
class OutputConfig(ItemTableConfig):
    """Vectors that a state is matched with."""

    tied: bool = True
    """Match with the vectors that are read; false gives the output a table of its own, by the settings beside this."""
    match: Match = "dot"
    """dot products, or cosine with a learned scale."""
    projects_state: bool = False
    """Learn a linear map of the state, from the identity on, before it is matched."""


@dataclass
class ItemReaderConfig:
    """Prompts, and the loss over the catalogue."""

    prompts: ItemPromptSettings = field(default_factory=ItemPromptSettings)
    """Text around the items, and which positions are trained."""
    loss: Literal["cross-entropy", "sampled-cross-entropy"] = "cross-entropy"
    """Softmax over the catalogue, or over the target and sampled items with logQ correction."""
    num_negatives: int = 1024
    """Items of the sampled softmax, shared by the labels of a batch."""
    negatives_alpha: float = 0.5
    """They are drawn by (training events) ** alpha: 0 is uniform."""
    dropout: float = 0.0
    """Dropout on the item vectors that are read, and on the states that are matched."""


@dataclass
class E4SRecConfig(ItemReaderConfig):
    """Prompts, item vectors, and the loss over the catalogue."""

    sasrec: Path | None = None
    """Whose item vectors `source: sasrec` takes: a run folder of sasrec, gru4rec, lrurec or e4srec (there, what the
    backbone reads), or a .safetensors file with one table [N + 1, D]."""
    encoder: str = "minilm"
    """Text encoder of `source: encoder`: minilm, a folder or a hub id. It is read once, not trained."""
    input: ItemTableConfig = field(default_factory=ItemTableConfig)
    """Item vectors that the backbone reads."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Item vectors that score the catalogue; the paper's head is tied false, source random."""


class ItemReader(Recommender):
    """A backbone without language-model head: it reads item vectors, and its states are matched with all items."""

    def __init__(
        self, config: ItemReaderConfig, backbone: Backbone, table_in: ProjectedTable, output: ItemMatcher
    ) -> None:
        super().__init__()
        self.backbone, self.input, self.output = backbone, table_in, output
        self.dropout, self.with_padding = config.dropout, config.prompts.published_padding

    def loss(self, batch: ItemPromptBatch) -> Loss:  # type: ignore[override]
        return Loss(self.ranking_loss(self.read(batch), batch), batch.count)

    def scores(self, batch: ItemPromptBatch) -> Tensor:  # type: ignore[override]
        return self.output(self.read(batch))

    def ranking_loss(self, states_TH: Tensor, batch: ItemPromptBatch) -> Tensor:
        """Return the summed softmax loss of the labels, over the catalogue or the batch's negatives."""
        assert batch.targets is not None
        if batch.negatives is None:
            return self.output.loss(states_TH, batch.targets, with_padding=self.with_padding)
        assert batch.log_expected is not None
        return self.output.sampled_loss(states_TH, batch.targets, batch.negatives, batch.log_expected)

    def read(self, batch: ItemPromptBatch) -> Tensor:
        """Return the states at the labelled slots, [T, H]."""
        return self.read_vectors(batch, self.input(batch.slot_items))

    def operands(self, states_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, D] and [N + 1, D] whose products are the scores that states give to the items."""
        return self.output.operands(states_TH, slice(None))

    @torch.no_grad()
    def catalogue_vectors(self) -> Tensor:
        """Return the item table as the backbone reads it."""
        return self.input.vectors().detach().clone()

    def read_vectors(self, batch: ItemPromptBatch, vectors_SH: Tensor) -> Tensor:
        """Return the states at the labelled slots, [T, H], where these vectors stand for the items."""
        body = causal_model(self.backbone)
        embed = body.get_input_embeddings()
        vectors_SH = dropout(vectors_SH, self.dropout, self.training)
        embeds = put_vectors(embed(batch.input_ids), batch.item_slots, vectors_SH)
        if batch.prefix_ids is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
            states = body(
                inputs_embeds=embeds, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False
            ).last_hidden_state
        else:
            states = run_behind(body, embed(batch.prefix_ids)[None], embeds)
        read = states.flatten(0, 1).index_select(0, batch.labelled)
        return dropout(read, self.dropout, self.training)


class E4SRec(ItemReader):
    """A backbone between two item tables of its own."""

    def __init__(self, config: E4SRecConfig, backbone: Backbone, table_in: ItemTable, table_out: ItemTable) -> None:
        width = causal_model(backbone).config.get_text_config().hidden_size
        mapped = identity_map(width) if config.output.projects_state else None
        super().__init__(config, backbone, table_in, ItemMatcher(table_out, config.output.match, mapped))
        self.config = config
        named = {"input.fixed": table_in, "output.table.fixed": table_out}
        distinct = {id(table): name for name, table in reversed(named.items()) if table.fixed is not None}
        self.saved_buffers = tuple(distinct.values())


def token_norm(backbone: Backbone) -> float:
    """Return the mean norm of the backbone's token embeddings."""
    weight = causal_model(backbone).get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return float(weight.detach().float().norm(dim=1).mean())
