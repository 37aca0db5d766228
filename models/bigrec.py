"""BIGRec: a language model writes the next title, and the catalogue is ranked by what it would write.

Source: Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems",
arXiv 2308.08434.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import PromptBatch
from data.prompt_rows import PromptSettings
from data.title_tokens import TitleTokens

from . import losses
from .backbone import Backbone
from .base import Loss, Recommender
from .decoder import decoder_of, run_behind, run_prefix, scoring_decoder
from .devices import gather_object
from .item_embeddings import mean_token_embeddings
from .title_generation import beam_scores, beam_search_titles
from .title_grounding import GroundingConfig, TitleGrounding
from .title_scoring import title_log_likelihoods
from .title_trie import TitleTrie


@dataclass
class BIGRecConfig:
    """What is trained, and how the catalogue is scored."""

    objective: Literal["titles", "items"] = "titles"
    """titles: predict the tokens of the next title. items: match the state before the next title with fixed item
    embeddings (the mean of the title's token embeddings) under full cross-entropy over the catalogue."""
    loss_on_inputs: bool = False
    """Also train the tokens of the prompt, as the published code does."""
    share_start: bool | None = None
    """Train with the tokens that all prompts of mode response begin with (the instruction) run once a pass, not once a
    row; dropout then takes the same of them for all rows. By default on CPUs, where every token costs; a GPU that a
    batch does not fill loses more by the pass of their own that these tokens take."""
    scoring: Literal["auto", "likelihood", "constrained", "beam", "generate", "items"] = "auto"
    """likelihood: exact log-likelihood of every title. constrained: the same, given that the answer is a title of the
    catalogue. beam: beam search for the likeliest of these. generate: free generation, grounded by embedding
    distance, as published. items: dot product with the item embeddings. auto: items for that objective, constrained
    for catalogues up to 20,000 titles, else beam."""
    num_beams: int = 20
    """Beams, and so distinct titles found, of beam scoring."""
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    """How text is grounded when scoring is generate."""
    prompts: PromptSettings = field(default_factory=lambda: PromptSettings(template="dense", mode="dense"))
    """Text and length of prompts. mode dense trains every next title of a window in one pass; response is the
    published one prompt a title."""


# Up to here an exact ranking is worth what it costs beside beams, whose work does not grow with the catalogue.
CONSTRAINED_MAX_TITLES = 20_000


class BIGRec(Recommender):
    """A causal language model over title tokens; every scoring mode ends in catalogue scores."""

    saved_buffers = ("grounding.gamma", "grounding.popularity")

    def __init__(
        self, config: BIGRecConfig, backbone: Backbone, titles: TitleTokens, grounding: TitleGrounding
    ) -> None:
        super().__init__()
        self.config, self.backbone, self.grounding = config, backbone, grounding
        self.scoring: str = config.scoring
        if config.scoring == "auto":
            constrained = "constrained" if len(titles) - 1 <= CONSTRAINED_MAX_TITLES else "beam"
            self.scoring = "items" if config.objective == "items" else constrained
        if (config.objective == "items") != (self.scoring == "items"):
            raise ValueError(
                f"--method.scoring {self.scoring} does not fit --method.objective {config.objective}: a model that "
                "matches items has learned no titles, and the other way round; use --method.scoring auto"
            )
        self.trie = TitleTrie.build(titles.offsets[1:], titles.ids)
        if config.objective == "items":
            self.item_head = ItemHead(mean_token_embeddings(backbone, titles.without_end()))

    @torch.no_grad()
    def catalogue_vectors(self) -> Tensor:
        """Return the base model's states at the ends of the titles, by which written text is grounded."""
        return nn.functional.pad(self.grounding.embedded_titles(self.backbone), (0, 0, 1, 0))

    def loss(self, batch: PromptBatch) -> Loss:  # type: ignore[override]
        assert batch.labelled is not None
        assert batch.targets is not None
        decoder = decoder_of(self.backbone)
        start = batch.shared if self.shares_start(batch.input_ids.device) else 0
        ids, labelled = batch.input_ids[:, start:], batch.labelled
        # Training pads stand on the right, where a causal model never sees them: no mask keeps the fast kernels.
        if start:
            states = run_behind(decoder.body, batch.input_ids[:1, :start], ids)
            labelled = labelled - start * (1 + labelled // batch.input_ids.shape[1])
        else:
            states = decoder.body(input_ids=ids, use_cache=False).last_hidden_state
        states = states.flatten(0, 1).index_select(0, labelled)
        if self.config.objective == "items":
            return Loss(self.item_head.loss(states, batch.targets), batch.count)
        # Vocabulary logits exist only where there is a label, and there a chunk at a time.
        total = losses.full_cross_entropy(states, decoder.weight, batch.targets)
        return Loss(total, batch.count)

    def shares_start(self, device: torch.device) -> bool:
        """Whether training runs once what all rows begin with."""
        return device.type == "cpu" if self.config.share_start is None else self.config.share_start

    def scores(self, batch: PromptBatch) -> Tensor:  # type: ignore[override]
        ids, mask = batch.input_ids, batch.attention_mask
        if self.scoring == "items":
            return self.item_head(run_prefix(scoring_decoder(self.backbone), ids, mask, use_cache=False).last_state)
        if self.scoring in ("likelihood", "constrained"):
            constrained = self.scoring == "constrained"
            return title_log_likelihoods(self.backbone, ids, mask, self.trie, constrained=constrained)
        if self.scoring == "generate":
            return self.grounding.scores(self.backbone, batch)
        items, log_likelihoods = beam_search_titles(self.backbone, ids, mask, self.trie, self.config.num_beams)
        return beam_scores(items, log_likelihoods, self.trie)

    @property
    def chooses_gamma(self) -> bool:
        """Whether `choose_gamma` has something to do."""
        return self.scoring == "generate" and self.grounding.chooses_gamma

    def distances_and_weights(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Return what the injection combines, each [B, N]."""
        return self.grounding.distances(self.backbone, batch), self.grounding.weight(batch)

    @torch.no_grad()
    def choose_gamma(self, wrapped: nn.Module, batches: Iterable[PromptBatch], target_items: np.ndarray) -> None:
        """Fit the injection's exponent on validation: this process's batches, and the held-out item of every row.

        `wrapped` is this model as it was prepared for its launch.
        """
        wrapped.eval()
        parts = [(batch.row, *wrapped(batch, method="distances_and_weights")) for batch in batches]
        shares = gather_object([tuple(torch.cat(column).cpu() for column in zip(*parts, strict=True))])
        rows, distances, weights = (torch.cat(column) for column in zip(*shares, strict=True))
        distinct, first = np.unique(rows.numpy(), return_index=True)  # a loader may repeat rows
        targets = torch.from_numpy(target_items[distinct])
        self.grounding.calibrate(distances[first], weights[first], targets)


class ItemHead(nn.Module):
    """Matches a state with fixed item embeddings: a projection, a learned temperature, and a dot product."""

    table: Tensor

    def __init__(self, table_NH: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", nn.functional.normalize(table_NH, dim=1))  # row 0, padding, stays zero
        self.projection = nn.Linear(table_NH.shape[1], table_NH.shape[1])
        self.log_scale = nn.Parameter(torch.tensor([20.0]).log())
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def loss(self, states_TH: Tensor, item_T: Tensor) -> Tensor:
        """Return the summed full cross-entropy over the catalogue."""
        query = nn.functional.normalize(self.projection(states_TH).float(), dim=1) * self.log_scale.exp()
        return losses.full_cross_entropy(query, self.table[1:], item_T - 1)

    def forward(self, states_BH: Tensor) -> Tensor:
        """Return scores [B, N + 1] float32; the temperature does not change the order."""
        with torch.autocast(states_BH.device.type, enabled=False):
            query = nn.functional.normalize(self.projection(states_BH.float()), dim=1)
            scores = query @ self.table.float().T
        scores[:, 0] = -torch.inf
        return scores
