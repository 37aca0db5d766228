"""BIGRec's second step: text that the model wrote freely, grounded in the catalogue by embedding distance."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.batches import PromptBatch
from data.prompts import clean_title, grounding_text

from . import grounding
from .backbone import Backbone, causal_model
from .base import Recommender
from .decoder import is_sharded, last_token_embeddings
from .title_generation import generate_free

CUTOFFS = (1, 5, 10, 20)  # gamma is chosen for the mean NDCG at these


@dataclass
class GroundingConfig:
    """How generated text becomes a ranking of the catalogue (scoring generate)."""

    num_beams: int = 4
    """Beams of the free generation, as published."""
    max_new_tokens: int = 32
    """Longest answer in tokens; published 128, of which titles need 5 to 15."""
    beams: Literal["best", "all"] = "all"
    """Ground the best beam only, as published, or take each item's smallest distance to any beam."""
    distance: Literal["l2", "cosine"] = "l2"
    """Distance between the embeddings of the text and of a title."""
    match: Literal["none", "exact", "substring"] = "exact"
    """Give distance 0 to the title that the text spells out, or also to the only title that contains it."""
    injection: Literal["none", "popularity", "collaborative"] = "none"
    """Bend distances by the items' popularity in training, or by the scores of another run (collaborative_run)."""
    collaborative_run: Path | None = None
    """Run folder of an ID recommender on the same catalogue; it is read again whenever this model is loaded."""
    gamma: float | None = None
    """Exponent of the injection; chosen on validation when not given."""

    def __post_init__(self) -> None:
        if (self.injection == "collaborative") != (self.collaborative_run is not None):
            raise ValueError(
                f"--method.grounding.injection {self.injection} with --method.grounding.collaborative_run "
                f"{self.collaborative_run}: collaborative injection needs the folder of a trained run, and only it does"
            )


class TitleGrounding(nn.Module):
    """Ranks the catalogue by the distance of each title to what the model wrote.

    Texts and titles are embedded by the base model, its adapter off: the state at their last token. `popularity`
    [N + 1] holds training counts; `gamma` is a buffer, so that the value found on validation is saved with the model.
    """

    popularity: Tensor
    gamma: Tensor

    def __init__(
        self,
        config: GroundingConfig,
        tokenizer: PreTrainedTokenizerBase,
        titles: Sequence[str],
        popularity: Tensor,
        cache: Path,
        base_name: str,
        collaborator: Recommender | None = None,
    ) -> None:
        super().__init__()
        self.collaborator = None if collaborator is None else collaborator.requires_grad_(False)
        self.config, self.tokenizer, self.cache, self.base_name = config, tokenizer, cache, base_name
        self.titles = [clean_title(title) for title in titles[1:]]
        self.register_buffer("popularity", popularity)
        self.register_buffer("gamma", torch.tensor(config.gamma or 0.0, dtype=torch.float64))
        self.title_embeddings: Tensor | None = None

    def train(self, mode: bool = True) -> "TitleGrounding":
        """Forget the titles' embeddings when training goes on: a base that is trained would give others."""
        if mode:
            self.title_embeddings = None
        super().train(mode)
        if self.collaborator is not None:
            self.collaborator.eval()  # it only ever scores
        return self

    def distances(self, backbone: Backbone, batch: PromptBatch) -> Tensor:
        """Return [B, N] distances scaled to 0..1 for each user, before injection."""
        config = self.config
        texts = generate_free(
            backbone, self.tokenizer, batch.input_ids, batch.attention_mask, config.num_beams, config.max_new_tokens
        )
        beams_kept = config.num_beams if config.beams == "all" else 1
        flat = [clean_title(grounding_text(text)) for beams in texts for text in beams[:beams_kept]]
        embedded = last_token_embeddings(backbone, self.tokenizer, flat)
        title_NH = self.embedded_titles(backbone).to(embedded.device)
        distance = grounding.title_distances(embedded.double(), title_NH.double(), config.distance)
        normalised = grounding.min_max(grounding.combine_beams(distance.unflatten(0, (len(texts), -1))))
        if config.match == "none":
            return normalised
        matches = grounding.match_titles(flat, self.titles, substring=config.match == "substring")
        named = matches.unflatten(0, (len(texts), -1)).any(dim=1).to(normalised.device)
        return normalised.masked_fill(named, 0.0)

    def scores(self, backbone: Backbone, batch: PromptBatch) -> Tensor:
        """Return catalogue scores [B, N + 1] float32."""
        distance = self.distances(backbone, batch)
        return grounding.catalog_scores(grounding.inject(distance, self.weight(batch), self.gamma))

    def weight(self, batch: PromptBatch) -> Tensor:
        """Return the injection's weight of each item for each row, [B, N] float64 in 0..1."""
        num_rows, num_items = len(batch.input_ids), len(self.titles)
        if self.config.injection == "popularity":
            return grounding.popularity_weight(self.popularity[1:]).expand(num_rows, num_items)
        if self.config.injection == "collaborative":
            assert self.collaborator is not None
            assert batch.history is not None
            return grounding.collaborative_weight(self.collaborator.scores(batch.history)[:, 1:].double())
        return self.gamma.new_zeros(num_rows, num_items)

    def calibrate(self, distance_BN: Tensor, weight_BN: Tensor, item_B: Tensor) -> None:
        """Choose gamma on validation users, given their distances, weights and held-out items."""
        groups = grounding.title_groups(self.titles)
        popularity = self.config.injection == "popularity"
        gammas = grounding.POPULARITY_GAMMAS if popularity else grounding.CF_GAMMAS
        found = grounding.search_gamma(distance_BN, weight_BN, item_B - 1, gammas, CUTOFFS, groups)
        self.gamma.copy_(found.shared)

    @property
    def chooses_gamma(self) -> bool:
        return self.config.injection != "none" and self.config.gamma is None

    def embedded_titles(self, backbone: Backbone) -> Tensor:
        """Return [N, H]; those of a frozen base are the same for every run, so they are kept on disk.

        Not those of a base that ZeRO-3 spreads: no process alone could compute them, or know the base by its weights.
        """
        if self.title_embeddings is None:
            if not isinstance(backbone, PreTrainedModel) and not is_sharded(backbone):
                self.title_embeddings = self._from_disk(backbone)
            else:
                self.title_embeddings = last_token_embeddings(backbone, self.tokenizer, self.titles)
        return self.title_embeddings

    def _from_disk(self, backbone: Backbone) -> Tensor:
        base = causal_model(backbone)
        described = [self.base_name, base.config.to_dict(), self.tokenizer.backend_tokenizer.to_str(), self.titles]
        described.append(_fingerprint(base.parameters()))
        key = hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()
        file = self.cache / "title_embeddings" / f"{key[:32]}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                embeddings = last_token_embeddings(backbone, self.tokenizer, self.titles).cpu().contiguous()
                unfinished = file.with_suffix(".unfinished")
                save_file({"titles": embeddings}, unfinished)
                unfinished.replace(file)
        return load_file(file)["titles"]


def _fingerprint(parameters: Iterable[nn.Parameter]) -> list[float]:
    """Return a few sums of the frozen weights: two checkpoints under one name are told apart."""
    return [float(p.detach().float().sum()) for p in parameters if not p.requires_grad][:8]
