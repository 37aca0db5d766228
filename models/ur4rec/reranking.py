"""UR4Rec as published: proxies are aligned with items, and then tell a ranker of candidate lists what texts say.

Source: "UR4Rec: Enhancing Reranking for Recommendation with Large Language Models through User Preference Retrieval",
COLING 2025.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import NO_LABEL
from data.candidate_lists import CandidateBatch
from models.base import Loss, Recommender, Stage
from models.gru4rec import GRU4Rec, GRU4RecConfig
from models.sasrec import SASRec, SASRecConfig
from models.sequence_recommender import SequenceConfig
from models.text_encoder import TextEncoder

from .proxies import PreferenceRetriever, PreferenceSettings
from .rankers import DLCM, PRM, HistoryRanker, ListRanker, SetRank

MORE_PLACES = 1  # than candidates in training: sampled-100 ranks a target among 100 others


@dataclass
class UR4RecPretrainConfig:
    """What the proxies are aligned with, and by which losses."""

    item_vectors: Path | None = None
    """Run of sasrec, gru4rec or lrurec whose item vectors are what training begins with; random when not given."""
    hidden_size: int = 64
    """Width of the item vectors."""
    history_length: int = 10
    """Newest items whose texts are read beside the user's own."""
    num_candidates: int = 11
    """The next item and random ones that the user had not met (published: 10 of these)."""
    cuts: int | None = None
    """Training examples of each user in an epoch, at random positions; every position when not given."""
    temperature: float = 0.1
    """Of the cosines in the contrastive loss; the paper does not give its own."""
    denominator: Literal["all", "negatives"] = "all"
    """Candidates that the contrastive loss normalises over: all of them, or without the next item, as printed."""
    matching_weight: float = 1.0
    """Weight of the matching loss; the paper does not give its own."""
    preferences: PreferenceSettings = field(default_factory=PreferenceSettings)

    def __post_init__(self) -> None:
        require_counts(self)
        if self.temperature <= 0:
            raise ValueError(f"--method.temperature {self.temperature}: expected more than 0")


@dataclass
class UR4RecConfig:
    """Which lists are ranked, by whom, and whether texts help."""

    retriever: Path | None = None
    """Run whose best items are the candidates; without one the model only ranks an evaluator's candidates
    (--evaluation.protocol sampled-100)."""
    negatives: Literal["random", "hard"] = "random"
    """Training candidates beside the target: random ones that the user had not met, in random order, or the
    retriever's list in its own order, where it holds the target."""
    ranker: Literal["dlcm", "prm", "setrank", "gru4rec", "sasrec"] = "prm"
    """Base ranker."""
    augment: bool = True
    """Give the ranker what the texts say of each candidate; false is the base ranker alone."""
    init: Path | None = None
    """Run of ur4rec-pretrain to begin with: its proxies, their network, and its item vectors."""
    item_vectors: Path | None = None
    """Without init: run of sasrec, gru4rec or lrurec whose item vectors are what training begins with."""
    hidden_size: int = 64
    """Width of the item vectors and of the ranker."""
    num_blocks: int = 2
    """Blocks of prm, setrank and sasrec."""
    num_heads: int = 2
    """Their attention heads."""
    dropout: float = 0.2
    """Dropout in the ranker."""
    history_length: int = 10
    """Newest events that the ranker sees, and whose items' texts are read."""
    num_candidates: int = 100
    """Candidates of a list."""
    cuts: int | None = None
    """Training lists of each user in an epoch, at random positions; every position when not given."""
    preferences: PreferenceSettings = field(default_factory=PreferenceSettings)

    def __post_init__(self) -> None:
        require_counts(self)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"--method.num_heads {self.num_heads} must divide --method.hidden_size {self.hidden_size}")
        if self.init is not None and (self.item_vectors is not None or not self.augment):
            raise ValueError(
                "--method.init brings proxies and item vectors: it goes with --method.augment true and without "
                "--method.item_vectors"
            )
        if self.negatives == "hard" and self.retriever is None:
            raise ValueError("--method.negatives hard are a retriever's: pass --method.retriever")


def require_counts(config: UR4RecPretrainConfig | UR4RecConfig) -> None:
    """Raise ValueError where a number is too small."""
    for name, least in (("history_length", 1), ("num_candidates", 2), ("cuts", 1), ("hidden_size", 1)):
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"--method.{name} {value}: expected at least {least}")


def real_texts(batch: CandidateBatch) -> Tensor:
    """Where a text stands, [B, 1 + L]: the user's always, if only as a vector of zeros."""
    return F.pad(batch.history.items > 0, (1, 0), value=True)


def read_texts(batch: CandidateBatch, encoder: TextEncoder | None) -> Tensor | None:
    """Return the texts as vectors of length 1, [B, 1 + L, T], zeros where there is none; by an encoder that learns."""
    if encoder is None:
        return batch.texts
    assert batch.tokens is not None
    assert batch.places is not None
    vectors_MT = F.normalize(encoder.encode((batch.tokens,)), dim=1)
    return F.embedding(batch.places, vectors_MT) * (batch.places > 0)[..., None]


class UR4RecPretrain(Stage):
    """Aligns what proxies find in the texts with the items that are chosen next, L_CL + weight * L_CF."""

    def __init__(
        self, config: UR4RecPretrainConfig, num_items: int, text_width: int, encoder: TextEncoder | None = None
    ) -> None:
        """`text_width` is that of the texts' vectors, which an `encoder` makes anew in every pass."""
        super().__init__()
        self.config, self.encoder = config, encoder
        self.items = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
        self.retriever = PreferenceRetriever(config.preferences, config.hidden_size, text_width)
        self.match = nn.Linear(config.preferences.hidden_size, 1)

    def loss(self, batch: CandidateBatch) -> Loss:  # type: ignore[override]
        assert batch.answers is not None
        items_BCH, real_BS, texts = self.items(batch.candidates), real_texts(batch), read_texts(batch, self.encoder)
        proxies_BKD = self.retriever(None, texts, real_BS)
        alone_BCD = self.retriever(items_BCH, None, None)
        matches_BC = self.match(self.retriever(items_BCH, texts, real_BS)).squeeze(-1).float()
        with torch.autocast(proxies_BKD.device.type, enabled=False):
            similar_BC = most_similar(proxies_BKD, alone_BCD) / self.config.temperature
            contrastive = contrastive_loss(similar_BC, batch.answers, self.config.denominator == "all")
            matching = matching_loss(matches_BC, batch.answers)
        total = contrastive + self.config.matching_weight * matching
        parts = {"contrastive": contrastive.detach(), "matching": matching.detach()}
        return Loss(total, batch.count, parts)


def most_similar(proxies_BKD: Tensor, items_BCD: Tensor) -> Tensor:
    """Return the cosine of each item with the proxy that is most like it, [B, C]."""
    return (F.normalize(items_BCD, dim=-1) @ F.normalize(proxies_BKD, dim=-1).transpose(1, 2)).amax(-1)


def contrastive_loss(logits_BC: Tensor, answers_B: Tensor, with_positive: bool) -> Tensor:
    """Sum of -log of exp(positive) over the sum of exp, of all candidates or of the others alone."""
    answers = answers_B.clamp(min=0)[:, None]
    others = logits_BC if with_positive else logits_BC.scatter(1, answers, -torch.inf)
    losses_B = others.logsumexp(1) - logits_BC.gather(1, answers).squeeze(1)
    return losses_B.where(answers_B != NO_LABEL, 0).sum()


def matching_loss(logits_BC: Tensor, answers_B: Tensor) -> Tensor:
    """Sum over rows of the mean binary cross-entropy of their candidates."""
    wanted = torch.zeros_like(logits_BC).scatter(1, answers_B.clamp(min=0)[:, None], 1.0)
    losses_B = F.binary_cross_entropy_with_logits(logits_BC, wanted, reduction="none").mean(1)
    return losses_B.where(answers_B != NO_LABEL, 0).sum()


def make_ranker(config: UR4RecConfig, num_items: int, said_width: int) -> ListRanker:
    """Return the base ranker; `said_width` is 0 where there are no texts."""
    width, dropout, blocks, heads = config.hidden_size, config.dropout, config.num_blocks, config.num_heads
    if config.ranker == "dlcm":
        return DLCM(num_items, width, said_width, dropout)
    if config.ranker == "prm":
        return PRM(num_items, width, said_width, dropout, blocks, heads, config.num_candidates + MORE_PLACES)
    if config.ranker == "setrank":
        return SetRank(num_items, width, said_width, dropout, blocks, heads)
    shape = SequenceConfig(hidden_size=width, dropout=dropout, window=config.history_length)
    if config.ranker == "gru4rec":
        return HistoryRanker(GRU4Rec(GRU4RecConfig(**vars(shape)), num_items), said_width)
    return HistoryRanker(SASRec(SASRecConfig(**vars(shape), num_blocks=blocks, num_heads=heads), num_items), said_width)


class UR4Rec(Recommender):
    """A base ranker, with or without what the texts say of each candidate; all other items tie below."""

    def __init__(
        self, config: UR4RecConfig, num_items: int, text_width: int, encoder: TextEncoder | None = None
    ) -> None:
        """As for `UR4RecPretrain`; without texts neither counts."""
        super().__init__()
        self.config, self.num_items, self.encoder = config, num_items, encoder
        said_width = config.preferences.hidden_size if config.augment else 0
        self.ranker = make_ranker(config, num_items, said_width)
        self.retriever = PreferenceRetriever(config.preferences, config.hidden_size, text_width) if said_width else None

    def begin_with(self, earlier: UR4RecPretrain) -> None:
        """Take over what the first stage has learned."""
        assert self.retriever is not None
        self.retriever.load_state_dict(earlier.retriever.state_dict())
        if self.encoder is not None and earlier.encoder is not None:
            self.encoder.load_state_dict(earlier.encoder.state_dict())
        self.set_item_vectors(earlier.items.weight)

    @torch.no_grad()
    def set_item_vectors(self, vectors_NH: Tensor) -> None:
        self.ranker.item_embedding.weight.copy_(vectors_NH)

    def list_scores(self, batch: CandidateBatch) -> Tensor:
        """Return the scores of each list, [B, C] float32."""
        items_BCH, said_BCD = self.ranker.item_embedding(batch.candidates), None
        if self.retriever is not None:
            said_BCD = self.retriever(items_BCH, read_texts(batch, self.encoder), real_texts(batch))
        return self.ranker(batch.history, items_BCH, said_BCD).float()

    def loss(self, batch: CandidateBatch) -> Loss:  # type: ignore[override]
        assert batch.answers is not None
        losses = F.cross_entropy(self.list_scores(batch), batch.answers, ignore_index=NO_LABEL, reduction="sum")
        return Loss(losses, batch.count)

    def scores(self, batch: CandidateBatch) -> Tensor:  # type: ignore[override]
        scores_BC = self.list_scores(batch)
        everything = scores_BC.new_full((len(scores_BC), self.num_items + 1), -torch.inf)
        return everything.scatter(1, batch.candidates, scores_BC)
