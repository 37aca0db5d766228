"""RankLLM: a language model puts a list of candidates in order, in one look at all of them.

Sources: Pradeep et al., "RankZephyr", arXiv 2312.02724; Reddy et al., "FIRST: Faster Improved Listwise Reranking with
Single Token Decoding", arXiv 2406.15657; the software castorini/rank_llm.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.candidate_rows import shuffled
from data.draws import Draws
from data.listwise_batches import ListBatch, RankedBatch
from data.listwise_prompts import ListwiseEncoder, ListwiseSettings
from data.permutations import PARSERS, STATUSES, Status

from . import losses
from .backbone import Backbone
from .base import Loss, Recommender
from .decoder import Decoder, decoder_of, scoring_decoder
from .listwise_losses import first_choice, weighted_ranknet
from .listwise_modes import duels, first_logits, logits_of, verdicts, written_orders
from .sliding_windows import best_first, slide, window_spans

Mode = Literal["logits", "generate", "pointwise", "pairwise"]
Objective = Literal["listwise", "ranknet", "generation", "combined"]
RANKNET_SHARE = 10.0  # of the combined objective, as published
HASH_BASE = 1_000_003  # of a list's items, modulo 2^64
ANSWERS_BEFORE_JUDGING = 20  # failures say little of a model before so many answers


@dataclass
class RankLLMConfig:
    """Whose candidates are ranked, how the model is asked, and what it learns."""

    retriever: Path | None = None
    """Run folder of the model whose best items are ranked."""
    num_candidates: int = 20
    """Items of the retriever that are ranked; the others stay behind them."""
    window: int = 20
    """Candidates in one prompt, at most; longer lists are ranked in windows, from the back to the front."""
    stride: int = 10
    """Places between two windows."""
    mode: Mode = "logits"
    """logits: one pass, ranked by the logits of the first identifier. generate: the model writes the permutation.
    pointwise: yes or no for each candidate. pairwise: every candidate against every other, in both orders."""
    permutations: int = 1
    """Orders in which each list is shown, combined by the mean rank; the first is that of the retriever."""
    parser: Literal["strict", "published"] = "strict"
    """generate: strict leaves the order as it is where an answer is no permutation; published takes any digits for
    one, only to compare."""
    max_failures: float = 0.1
    """generate: stop when more than this share of the answers is no permutation; 1 never stops."""
    max_new_tokens: int | None = None
    """generate: most tokens of an answer, as many as a permutation has when not given (a model that thinks first needs
    more)."""
    objective: Objective = "combined"
    """What is trained. listwise: cross-entropy of the first identifier. ranknet: all pairs of identifiers. generation:
    the text of the permutation. combined: generation + 10 ranknet, as published."""
    labels: Path | None = None
    """Learn a teacher's order from this file of launch/label.py, instead of the next item and the retriever's order."""
    prompts: ListwiseSettings = field(default_factory=ListwiseSettings)
    """How histories and candidates are written."""

    def __post_init__(self) -> None:
        window_spans(self.num_candidates, self.window, self.stride)
        for name, least in (("num_candidates", 2), ("window", 2), ("permutations", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--method.{name} {value}: expected at least {least}")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"--method.max_failures {self.max_failures}: expected a share from 0 to 1")

    @property
    def shown(self) -> int:
        """Candidates in a prompt."""
        return min(self.window, self.num_candidates)


class TooManyFailures(RuntimeError):
    """A model writes too much that is no permutation."""


class Judgement(NamedTuple):
    """One look at the lists of a batch: higher is better, as listed; and how the answers were read."""

    scores: Tensor  # [B, W] float32
    statuses: list[Status]  # [B]


class RankLLM(Recommender):
    """Puts candidates in order; the order decides their scores, and all other items tie below them."""

    def __init__(self, config: RankLLMConfig, backbone: Backbone, encoder: ListwiseEncoder, seed: int) -> None:
        super().__init__()
        self.config, self.backbone, self.encoder, self.seed = config, backbone, encoder, seed
        self.num_items = len(encoder.titles) - 1
        self.counts: Counter[str] = Counter()  # of users, windows, calls and statuses of answers
        if config.mode in ("logits", "pairwise"):
            encoder.single_names(2 if config.mode == "pairwise" else config.shown)

    def loss(self, batch: RankedBatch) -> Loss:  # type: ignore[override]
        decoder = decoder_of(self.backbone)
        # Pads stand on the right, where a causal model never sees them.
        states_SH = decoder.body(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        objective = self.config.objective
        parts: dict[str, Tensor] = {}
        if objective in ("generation", "combined"):
            parts["generation"] = written_loss(decoder, states_SH, batch)
        if objective in ("ranknet", "combined", "listwise"):
            names = self.encoder.single_names(batch.ranks.shape[1])
            logits = logits_of(decoder, states_SH.index_select(0, batch.opened), names)
            if objective == "listwise":
                parts["listwise"] = first_choice(logits, batch.ranks).sum()
            else:
                parts["ranknet"] = weighted_ranknet(logits, batch.ranks).sum()
        share = RANKNET_SHARE if objective == "combined" else 1.0
        total = sum(part * (share if name == "ranknet" else 1.0) for name, part in parts.items())
        assert isinstance(total, Tensor)
        logged = {name: part.detach() for name, part in parts.items()} if objective == "combined" else {}
        return Loss(total, batch.count, logged)

    def scores(self, batch: ListBatch) -> Tensor:  # type: ignore[override]
        found, _ = self.judged(batch)
        scores = found.new_full((len(found), self.num_items + 1), -torch.inf)
        return scores.scatter(1, batch.candidates, found)

    @torch.no_grad()
    def judged(self, batch: ListBatch) -> tuple[Tensor, list[Status]]:
        """Return the candidates' scores as listed, [B, K] float32, and how each row's answers were read.

        A list of one window has what the model says of it; in a longer one places count, not scores: 1 for the last.
        """
        config = self.config
        rows, width = batch.candidates.shape
        spans = window_spans(width, config.window, config.stride)
        self.counts.update(users=rows, windows=rows * len(spans))
        judgements: list[Judgement] = []

        def rank_window(items_BW: Tensor) -> Tensor:
            judgements.append(self.judge(batch, items_BW))
            return best_first(judgements[-1].scores)

        order_BK = slide(batch.candidates, spans, rank_window)
        statuses = [worst(found) for found in zip(*(judgement.statuses for judgement in judgements), strict=True)]
        if len(judgements) == 1:
            return judgements[0].scores, statuses
        place_BK = (batch.candidates[:, :, None] == order_BK[:, None]).int().argmax(2)
        return (width - place_BK).float(), statuses

    @torch.no_grad()
    def judge(self, batch: ListBatch, items_BW: Tensor) -> Judgement:
        """Rank one window of each row, in as many orders as the settings ask for.

        One order keeps what the model says (logits in the mode logits); several give minus the mean rank.
        """
        history, items = _histories(batch), items_BW.cpu().numpy()
        lists, looks = batch.candidates.cpu().numpy(), []
        for shown_BW in orders(items.shape, self.config.permutations, self.seed, lists):
            scores, statuses = self.look(history, np.take_along_axis(items, shown_BW, axis=1))
            back = torch.from_numpy(np.argsort(shown_BW, axis=1)).to(scores.device)
            looks.append(Judgement(scores.gather(1, back), statuses))
            self.counts.update(statuses)
        self._stop_on_failures()
        if len(looks) == 1:
            return Judgement(looks[0].scores.to(items_BW.device), looks[0].statuses)
        ranks = torch.stack([best_first(look.scores).argsort(1).float() for look in looks])
        statuses = [worst(found) for found in zip(*(look.statuses for look in looks), strict=True)]
        return Judgement(-ranks.mean(0).to(items_BW.device), statuses)

    def look(self, history: list[np.ndarray], items_BW: np.ndarray) -> Judgement:
        """Ask the model once about lists as they are shown."""
        mode, config = self.config.mode, self.config
        rows, width = items_BW.shape
        self.counts["calls"] += rows * {"pointwise": width, "pairwise": width * (width - 1)}.get(mode, 1)
        lists = scoring_decoder(self.backbone), self.encoder, history, items_BW
        if mode == "generate":
            return Judgement(*written_orders(*lists, PARSERS[config.parser], config.max_new_tokens))
        ask = {"logits": first_logits, "pointwise": verdicts, "pairwise": duels}[mode]
        return Judgement(ask(*lists), ["ok"] * rows)

    def take_counts(self) -> Counter[str]:
        """Return what this process has counted since the last time, and begin anew."""
        counts, self.counts = self.counts, Counter()
        return counts

    def _stop_on_failures(self) -> None:
        answers = sum(self.counts[status] for status in STATUSES)
        failed = answers - self.counts["ok"]
        if answers >= ANSWERS_BEFORE_JUDGING and failed > self.config.max_failures * answers:
            faults = ", ".join(f"{self.counts[status]} {status}" for status in STATUSES[1:])
            raise TooManyFailures(
                f"{failed} of {answers} answers are no permutation of their candidates ({faults}), more than "
                f"--method.max_failures {self.config.max_failures}: raise it (1 never stops), pass --method.mode "
                "logits, which cannot fail, or train the model to write permutations"
            )


def written_loss(decoder: Decoder, states_SH: Tensor, batch: RankedBatch) -> Tensor:
    """The sum over prompts of the mean cross-entropy of an answer's tokens."""
    total = losses.full_cross_entropy(states_SH.index_select(0, batch.labelled), decoder.weight, batch.targets)
    return total / max(1, len(batch.targets) // len(batch.opened))


def worst(statuses: Sequence[Status]) -> Status:
    """The first fault among the answers about one row."""
    return next((status for status in statuses if status != "ok"), "ok")


def orders(shape: tuple[int, ...], number: int, seed: int, lists_BK: np.ndarray) -> list[np.ndarray]:
    """`number` orders of the places of windows [B, W]: as they are, then random ones that belong to each row's list."""
    key_B = np.zeros(len(lists_BK), dtype=np.uint64)
    for column in lists_BK.T:
        key_B = key_B * np.uint64(HASH_BASE) + column.astype(np.uint64)
    as_it_is = np.tile(np.arange(shape[1]), (shape[0], 1))
    return [as_it_is] + [shuffled(as_it_is, Draws.of(seed, order, key_B)) for order in range(1, number)]


def _histories(batch: ListBatch) -> list[np.ndarray]:
    items, lengths = batch.history.items.cpu().numpy(), batch.history.lengths.tolist()
    return [row[:length] for row, length in zip(items, lengths, strict=True)]
