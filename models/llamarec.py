"""LlamaRec: a language model reads a history and a retriever's candidates, and one position's logits rank them.

Source: Yue et al., "LlamaRec: Two-Stage Recommendation using Large Language Models for Ranking", arXiv 2311.02089.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import NO_LABEL
from data.ranking_batches import RankingBatch
from data.ranking_prompts import RankingSettings

from . import losses
from .backbone import Backbone, causal_model
from .base import Loss, Recommender
from .decoder import Decoder, decoder_of, product, run_prefix, scoring_decoder
from .devices import gather_object
from .item_embeddings import put_vectors

WEIGHTS_TRIED = 21  # of the language model, 0 to 1
CUTOFF = 10  # of the NDCG that chooses among them


@dataclass
class LlamaRecConfig:
    """Who retrieves, what is learned, and how candidates are scored."""

    retriever: Path | None = None
    """Run folder of the run whose best items are the candidates."""
    negatives: Literal["random", "hard"] = "random"
    """Training candidates beside the target: uniform among unseen items, as published, or the retriever's best for the
    history, as in evaluation."""
    cuts: int | None = None
    """Training examples of each user in an epoch, at random positions; every position when not given, as published."""
    objective: Literal["candidates", "published"] = "candidates"
    """candidates: cross-entropy over the candidates' identifiers alone. published: over the whole vocabulary, of the
    letter and of the end of the text behind it."""
    scoring: Literal["identifiers", "dot"] = "identifiers"
    """identifiers: candidates are listed in the prompt, and the logits of their identifiers score them. dot: they are
    not, and each is scored by the cosine of its vector with the state behind the history; any encoder may read it."""
    identifiers: Literal["auto", "letters", "vectors"] = "auto"
    """letters: A to Z, as published. vectors: a learned vector a place, for more than 26 candidates or where the
    tokenizer has no token for a letter alone. auto: letters where that can be."""
    verbalizer: Literal["context", "published"] = "context"
    """Which token a letter is: the one that stands behind the prompt, or that of the letter alone, as the published
    code reads though it trains the other one."""
    item_vectors: Literal["titles", "retriever"] = "titles"
    """Vectors of scoring dot: the mean of a title's token embeddings, or the retriever's item table."""
    permutations: int = 1
    """Orders in which an evaluation shows the candidates: the retriever's, and random ones; scores are averaged."""
    llm_weight: float | None = None
    """Candidates are ranked by w z(language model) + (1 - w) z(retriever), z-scores over a user's candidates. Chosen on
    validation users when not given; 1 is the language model alone, as published."""
    prompts: RankingSettings = field(default_factory=RankingSettings)
    """Text and length of prompts."""

    def __post_init__(self) -> None:
        if self.llm_weight is not None and not 0 <= self.llm_weight <= 1:
            raise ValueError(f"--method.llm_weight {self.llm_weight}: expected 0 to 1")
        for name in ("permutations", "cuts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--method.{name} {value}: expected at least 1")
        if self.scoring == "dot" and (self.permutations > 1 or self.objective == "published"):
            raise ValueError(
                "--method.scoring dot shows no candidates and learns no letters: it goes with --method.permutations 1 "
                "and --method.objective candidates"
            )


class LlamaRec(Recommender):
    """Ranks a retriever's candidates; all other items tie below them."""

    saved_buffers = ("llm_weight",)
    llm_weight: Tensor  # scalar; in training validations rank by the language model alone

    def __init__(
        self,
        config: LlamaRecConfig,
        backbone: Backbone,
        num_items: int,
        identifier_ids: np.ndarray | None = None,
        read_ids: np.ndarray | None = None,
        end_id: int | None = None,
        item_table: Tensor | None = None,
    ) -> None:
        """`identifier_ids` [K] are letters' tokens behind a prompt; None makes identifiers vectors.

        `read_ids` [K] are tokens to read instead of them. `item_table` [N + 1, D] is for scoring dot, whose backbone
        has no head.
        """
        super().__init__()
        self.config, self.backbone, self.num_items, self.end_id = config, backbone, num_items, end_id
        weight = 1.0 if config.llm_weight is None else config.llm_weight
        self.register_buffer("llm_weight", torch.tensor(weight))
        self.head: LetterHead | VectorHead | ItemHead
        if config.scoring == "dot":
            assert item_table is not None
            self.head = ItemHead(item_table, causal_model(backbone).config.get_text_config().hidden_size)
        elif identifier_ids is not None:
            self.head = LetterHead(identifier_ids if read_ids is None else read_ids, identifier_ids)
        else:
            self.head = VectorHead(backbone, config.prompts.num_candidates)
            # nothing reads the vocabulary's head, if it has its own weight
            tokens, vocabulary = causal_model(backbone).get_input_embeddings().weight, decoder_of(backbone).weight
            vocabulary.requires_grad_(vocabulary is tokens and vocabulary.requires_grad)

    def loss(self, batch: RankingBatch) -> Loss:  # type: ignore[override]
        assert batch.answers is not None
        decoder, states_LH = decoder_of(self.backbone), self.states(batch)
        states_BH = states_LH.index_select(0, batch.ends)
        if self.config.objective == "published":
            behind_BH = states_LH.index_select(0, batch.ends + 1)  # the letter stands there
            n = batch.count // 2  # every row has a letter and an end, or none has
            return Loss(self._published(decoder, states_BH[:n], behind_BH[:n], batch.answers[:n]), batch.count)
        logits_BK = self.head(decoder, states_BH, batch.candidates)
        return Loss(F.cross_entropy(logits_BK, batch.answers, ignore_index=NO_LABEL, reduction="sum"), batch.count)

    def states(self, batch: RankingBatch) -> Tensor:
        """Return the states of all slots of prompts that are padded on the right, [R * L, H]."""
        # There a causal model never sees pads; what reads for a dot product may see both ways.
        mask = batch.attention_mask if isinstance(self.head, ItemHead) else None
        body = decoder_of(self.backbone).body
        return body(**self.inputs(batch), attention_mask=mask, use_cache=False).last_hidden_state.flatten(0, 1)

    def _published(self, decoder: Decoder, states_BH: Tensor, behind_BH: Tensor, answers_B: Tensor) -> Tensor:
        """Return the loss of the letter and of the end behind it, over the vocabulary."""
        assert isinstance(self.head, LetterHead)
        assert self.end_id is not None
        letters = self.head.answer_ids[answers_B]
        labels = torch.cat([letters, torch.full_like(letters, self.end_id)])
        return losses.full_cross_entropy(torch.cat([states_BH, behind_BH]), decoder.weight, labels)

    def scores(self, batch: RankingBatch) -> Tensor:  # type: ignore[override]
        scores_BK = self.fused(self.candidate_scores(batch), batch.retriever_scores, self.llm_weight)
        return scores_BK.new_full((len(scores_BK), self.num_items + 1), -torch.inf).scatter(
            1, batch.candidates, scores_BK
        )

    def candidate_scores(self, batch: RankingBatch) -> Tensor:
        """Return what the language model says of each user's candidates, [B, K] float32, the mean over all orders."""
        decoder, inputs = scoring_decoder(self.backbone), self.inputs(batch)
        if isinstance(self.head, ItemHead):
            states_RH = self.states(batch).index_select(0, batch.ends)
        else:
            prompts = inputs["inputs_embeds"] if "inputs_embeds" in inputs else inputs["input_ids"]
            states_RH = run_prefix(decoder, prompts, batch.attention_mask, use_cache=False).last_state
        logits_RK = self.head(decoder, states_RH, batch.candidates)
        by_place_RK = torch.empty_like(logits_RK).scatter_(1, batch.order, logits_RK)
        return by_place_RK.view(len(batch.candidates), -1, logits_RK.shape[1]).mean(1)

    @staticmethod
    def fused(llm_BK: Tensor, retriever_BK: Tensor | None, weight: Tensor | float) -> Tensor:
        """Return the weighted sum of both z-scores; the language model's own scores where there are no others."""
        if retriever_BK is None:
            return llm_BK
        return weight * z_scores(llm_BK) + (1 - weight) * z_scores(retriever_BK)

    def inputs(self, batch: RankingBatch) -> dict[str, Tensor]:
        """Return the prompts as tokens, or as embeddings where vectors stand for identifiers."""
        if batch.index_slots is None:
            return {"input_ids": batch.input_ids}
        assert isinstance(self.head, VectorHead)
        embeds = causal_model(self.backbone).get_input_embeddings()(batch.input_ids)
        vectors = self.head.shown.repeat(len(batch.input_ids), 1)
        return {"inputs_embeds": put_vectors(embeds, batch.index_slots, vectors)}

    def both_scores(self, batch: RankingBatch) -> tuple[Tensor, Tensor]:
        """Return what fusion combines: candidate scores of the language model and of the retriever, each [B, K]."""
        assert batch.retriever_scores is not None
        return self.candidate_scores(batch), batch.retriever_scores

    @torch.no_grad()
    def choose_weight(self, wrapped: nn.Module, batches: Iterable[RankingBatch], target_items: np.ndarray) -> None:
        """Fit the language model's weight on validation: this process's batches, and every row's held-out item.

        `wrapped` is this model as it was prepared for its launch.
        """
        wrapped.eval()
        parts = [(batch.row, batch.candidates, *wrapped(batch, method="both_scores")) for batch in batches]
        shares = gather_object([tuple(torch.cat(column).cpu() for column in zip(*parts, strict=True))])
        rows, candidates, llm, retriever = (torch.cat(column) for column in zip(*shares, strict=True))
        distinct, first = np.unique(rows.numpy(), return_index=True)  # a loader may repeat rows
        is_target = candidates[first] == torch.from_numpy(target_items[distinct])[:, None]
        self.llm_weight.fill_(best_weight(llm[first], retriever[first], is_target))


class LetterHead(nn.Module):
    """The logits of letters' tokens: only their rows of the head are multiplied."""

    ids: Tensor
    answer_ids: Tensor

    def __init__(self, ids: np.ndarray, answer_ids: np.ndarray) -> None:
        """`ids` [K] are read, `answer_ids` [K] are what stands behind prompts in training."""
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids))
        self.register_buffer("answer_ids", torch.tensor(answer_ids))

    def forward(self, decoder: Decoder, states_BH: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K] float32, a column an identifier."""
        return product(states_BH, decoder.weight[self.ids]).float()


class VectorHead(nn.Module):
    """Identifiers as learned vectors: `shown` stand in the prompt, and the products with `named` are the logits."""

    def __init__(self, backbone: Backbone, count: int) -> None:
        super().__init__()
        embedding = causal_model(backbone).get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.shown = nn.Parameter(like_rows_of(embedding, count))
        self.named = nn.Parameter(like_rows_of(decoder_of(backbone).weight, count))

    def forward(self, decoder: Decoder, states_BH: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K] float32, a column an identifier."""
        return product(states_BH, self.named).float()


class ItemHead(nn.Module):
    """Cosines of the projected state with the candidates' vectors, by a learned temperature."""

    table: Tensor

    def __init__(self, table_ND: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("table", F.normalize(table_ND.float(), dim=1))
        self.projection = nn.Linear(width, table_ND.shape[1])
        self.log_scale = nn.Parameter(torch.tensor([20.0]).log())

    def forward(self, decoder: Decoder, states_BH: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K] float32, a column a candidate."""
        query_BD = F.normalize(self.projection(states_BH).float(), dim=1) * self.log_scale.exp()
        return (query_BD[:, None] * self.table[candidates]).sum(-1).float()


def like_rows_of(weight_VH: Tensor, count: int) -> Tensor:
    """Return [count, H] random float32 rows, spread as those of a token table are."""
    weight = weight_VH.detach().float()
    return weight.mean(0) + torch.randn(count, weight.shape[1], device=weight.device) * weight.std(0)


def z_scores(scores_BK: Tensor) -> Tensor:
    """Return each row with mean 0 and deviation 1; zeros where all are equal."""
    centred = scores_BK.float() - scores_BK.float().mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)


def best_weight(llm_BK: Tensor, retriever_BK: Tensor, is_target_BK: Tensor) -> float:
    """Return the weight of the language model under which the targets' NDCG@10 is highest; the least of equals.

    Rows without a target say nothing.
    """
    found = is_target_BK.any(1)
    target = is_target_BK[found].int().argmax(1, keepdim=True)
    weights = torch.linspace(0, 1, WEIGHTS_TRIED)
    gains = []
    for weight in weights:
        fused = LlamaRec.fused(llm_BK[found], retriever_BK[found], weight)
        rank = (fused > fused.gather(1, target)).sum(1)
        gains.append((1 / (rank + 2.0).log2()).masked_fill(rank >= CUTOFF, 0.0).double().sum())
    return float(weights[int(torch.stack(gains).argmax())]) if found.any() else 1.0
