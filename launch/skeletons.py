"""Models without weights, one function a method: what launch/plan.py needs to know beside launch/methods.py."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import PromptBatch, SequenceBatch
from data.identifiers import LETTERS
from data.item_prompts import ItemPromptBatch
from data.listwise_batches import RankedBatch
from data.listwise_prompts import ListwiseEncoder
from data.ranking_batches import RankingBatch
from data.retrieval_examples import RetrievalBatch
from data.retrieval_texts import RetrievalTexts
from data.stage_examples import MaskedBatch, WholeTextBatch
from data.texts import TextBatch
from data.title_tokens import TokenTable
from models import losses
from models.backbone import Backbone, BackboneConfig, causal_model
from models.base import Loss, Recommender
from models.bigrec import BIGRec, BIGRecConfig, ItemHead
from models.decoder import decoder_of
from models.dense_retrieval import DenseRetrieval
from models.dense_retrieval_config import DenseRetrievalConfig
from models.dllm2rec import DLLM2RecConfig
from models.e4srec import E4SRec, E4SRecConfig
from models.item_embeddings import ItemTable, ItemTableConfig
from models.llamarec import LlamaRec, LlamaRecConfig, VectorHead
from models.llara import ILoRA, ILoRAConfig, LLaRA, LLaRAConfig
from models.mntp import MNTP, MNTPConfig
from models.moe_lora import find_gate
from models.rankllm import RankLLM, RankLLMConfig
from models.sasrec import SASRec, SASRecConfig
from models.sequence_recommender import SequenceConfig
from models.simcse import SimCSE, SimCSEConfig
from models.skeleton import backbone_skeleton
from models.text_encoder import TextEncoder

from .config import RunConfig
from .llm2vec import both_ways, with_dropout
from .sequences import sequence_recommender

TITLE_TOKENS = 16  # of an item's text
ANSWER_TOKENS = 4  # of each candidate in a written permutation: "[", "A", "]", " >"
SASREC_WIDTH = SASRecConfig().hidden_size  # of item vectors that are read from a run


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, its training batch, and how wide its logits are."""

    model: Recommender
    batch: Callable[[int, int], Any]  # (rows, length) -> a batch whose every position has a label
    classes: int
    left_out: str = ""  # what of the model is missing, in words


def make_skeleton(config: RunConfig, num_items: int) -> Skeleton:
    """Return the model that `config` names, for a catalogue of `num_items`."""
    if isinstance(config.method, SequenceConfig):
        return _sequences(config.method, num_items)
    if isinstance(config.method, DLLM2RecConfig):
        return replace(_sequences(config.method.student, num_items), left_out="what the teacher adds to the loss")
    assert config.backbone is not None
    if isinstance(config.method, DenseRetrievalConfig):
        return _dense_retrieval(config.method, config.backbone, num_items)
    if isinstance(config.method, E4SRecConfig):
        return _e4srec(config.method, backbone_skeleton(config.backbone, head=False), num_items)
    if isinstance(config.method, MNTPConfig):
        return _mntp(config.method, backbone_skeleton(both_ways(config.backbone)))
    if isinstance(config.method, SimCSEConfig):
        return _simcse(config.method, backbone_skeleton(with_dropout(config.backbone), head=False))
    backbone = backbone_skeleton(config.backbone)
    if isinstance(config.method, BIGRecConfig):
        return _bigrec(config.method, backbone, num_items)
    if isinstance(config.method, LLaRAConfig):
        return _llara(config.method, backbone, num_items)
    if isinstance(config.method, LlamaRecConfig):
        return _llamarec(config.method, backbone, num_items)
    if isinstance(config.method, RankLLMConfig):
        return _rankllm(config.method, backbone)
    left_out = f"what {config.model} trains beside the backbone"
    return Skeleton(NextToken(backbone), prompts, vocabulary(backbone), left_out)


def _sequences(config: SequenceConfig, num_items: int) -> Skeleton:
    with torch.device("meta"):
        model = sequence_recommender(config, num_items).train()

    def batch(rows: int, length: int) -> SequenceBatch:
        sampled = config.loss != "cross-entropy"
        return SequenceBatch(
            items=torch.zeros(rows, length, dtype=torch.int64),
            lengths=torch.zeros(rows, dtype=torch.int64),
            labelled=torch.zeros(rows * length, dtype=torch.int64),
            targets=torch.ones(rows * length, dtype=torch.int64),
            negatives=torch.zeros(rows, config.num_negatives, dtype=torch.int64) if sampled else None,
            count=rows * length,
        )

    return Skeleton(model, batch, num_items if config.loss == "cross-entropy" else config.num_negatives)


def _bigrec(config: BIGRecConfig, backbone: Backbone, num_items: int) -> Skeleton:
    model = BIGRecSkeleton(config, backbone, num_items).train()
    classes = num_items if config.objective == "items" else vocabulary(backbone)
    return Skeleton(model, prompts, classes)


def _e4srec(config: E4SRecConfig, backbone: Backbone, num_items: int) -> Skeleton:
    width = causal_model(backbone).config.get_text_config().hidden_size
    with torch.device("meta"):

        def table(part: ItemTableConfig, flag: Literal["input", "output"]) -> ItemTable:
            own_width = SASREC_WIDTH if part.source == "sasrec" or config.sasrec is not None else width
            return ItemTable(torch.empty(num_items + 1, own_width), part, width, 1.0, flag)

        table_in = table(config.input, "input")
        model = E4SRec(
            config, backbone, table_in, table_in if config.output.tied else table(config.output, "output")
        ).train()

    def batch(rows: int, length: int) -> ItemPromptBatch:
        slots = torch.zeros(rows * length, dtype=torch.int64)
        labelled = slots[:rows] if config.prompts.mode == "prefix" else slots
        ids, targets = torch.zeros(rows, length, dtype=torch.int64), torch.ones_like(labelled)
        return ItemPromptBatch(ids, None, slots, torch.ones_like(slots), labelled, targets, count=len(labelled))

    return Skeleton(model, batch, num_items, "the instruction before the items, and titles beside them")


def _dense_retrieval(config: DenseRetrievalConfig, backbone: BackboneConfig, num_items: int) -> Skeleton:
    readers = [backbone_skeleton(backbone, head=False) for _ in range(1 + config.two_encoders)]
    model = dense_retrieval_skeleton(config, readers, num_items).train()
    rows_at_once = config.grad_cache_rows

    def batch(rows: int, length: int) -> RetrievalBatch:
        pieces = [min(rows_at_once or rows, rows - start) for start in range(0, rows, rows_at_once or rows)]
        items, nothing = torch.arange(rows), torch.zeros(rows)
        seen = torch.zeros(2, rows * length // TITLE_TOKENS, dtype=torch.int64)
        return RetrievalBatch(
            tuple(fake_texts(piece, length) for piece in pieces),
            tuple(fake_texts(piece, TITLE_TOKENS) for piece in pieces),
            *(items, items, items, nothing, seen),
            count=rows,
        )

    return Skeleton(model, batch, num_items, "the index as it is encoded, a few titles at a time")


def dense_retrieval_skeleton(
    config: DenseRetrievalConfig, readers: list[Backbone], num_items: int, device: str = "meta"
) -> DenseRetrieval:
    """Dense retrieval around one backbone or two, for titles of a usual length."""
    encoders = [TextEncoder(reader, config.pooling) for reader in readers]
    with torch.device(device):
        return DenseRetrievalSkeleton(config, num_items, encoders[0], encoders[-1])


class DenseRetrievalSkeleton(DenseRetrieval):
    """Its training pass with titles of a usual length; the index stays as it is."""

    def __init__(
        self, config: DenseRetrievalConfig, num_items: int, user_encoder: TextEncoder, item_encoder: TextEncoder
    ) -> None:
        nothing, titles = np.empty(0, np.int64), TokenTable.of([[]] * (num_items + 1))
        texts = RetrievalTexts(nothing, nothing, nothing, nothing, titles, titles, config.texts)
        super().__init__(config, texts, user_encoder, item_encoder, nothing)

    def refresh(self, progress: float) -> None:
        pass

    def own_share(self) -> Tensor:
        return torch.arange(1, len(self.item_index))

    def hard_negatives(self, users_TD: Tensor, batch: RetrievalBatch) -> Tensor:
        return torch.ones(len(users_TD) * self.config.hard_negatives, dtype=torch.int64)

    def encode_items(self, items: Tensor, rows: int | None = None) -> Tensor:
        at_once = rows or self.config.grad_cache_rows or len(items)
        pieces = [min(at_once, len(items) - start) for start in range(0, len(items), at_once)]
        return self.encode(self.item_encoder, tuple(fake_texts(piece, TITLE_TOKENS) for piece in pieces))


def fake_texts(rows: int, length: int) -> TextBatch:
    """Return [rows, length] tokens, one of them padding: without any, attention would do without a mask."""
    ids = torch.ones(rows, length, dtype=torch.int64)
    mask = ids.clone()
    mask[0, -1] = 0
    return TextBatch(ids, mask, mask.clone())


def _llara(config: LLaRAConfig, backbone: Backbone, num_items: int) -> Skeleton:
    model = llara_skeleton(config, backbone, num_items).train()
    shown = config.prompts

    def batch(rows: int, length: int) -> PromptBatch:
        slots = torch.zeros(rows * (shown.history_length + shown.num_candidates), dtype=torch.int64)
        items = torch.ones(rows, shown.history_length, dtype=torch.int64)
        history = SequenceBatch(items, torch.full((rows,), shown.history_length))
        return replace(prompts(rows, length), item_slots=slots, slot_items=torch.ones_like(slots), history=history)

    return Skeleton(model, batch, vocabulary(backbone))


def _mntp(config: MNTPConfig, backbone: Backbone) -> Skeleton:
    def batch(rows: int, length: int) -> MaskedBatch:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        masked = torch.zeros(math.ceil(config.masking.rate * rows * length), dtype=torch.int64)
        return MaskedBatch(ids, torch.ones_like(ids), masked, masked.clone(), count=len(masked))

    return Skeleton(MNTP(backbone).train(), batch, vocabulary(backbone))


def _simcse(config: SimCSEConfig, backbone: Backbone) -> Skeleton:
    def batch(rows: int, length: int) -> WholeTextBatch:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return WholeTextBatch(TextBatch(ids, torch.ones_like(ids), torch.ones_like(ids)), count=rows)

    width = causal_model(backbone).config.get_text_config().hidden_size
    return Skeleton(SimCSE(config, TextEncoder(backbone, config.pooling)).train(), batch, width)


def llara_skeleton(config: LLaRAConfig, backbone: Backbone, num_items: int, device: str = "meta") -> LLaRA:
    """LLaRA or iLoRA around a SASRec of the default shape; the titles, which only scoring needs, are left out."""
    needed = config.sasrec is not None or config.prompts.mode != "text" or isinstance(config, ILoRAConfig)
    kind = ILoRA if isinstance(config, ILoRAConfig) else LLaRA
    with torch.device(device):
        sasrec = SASRec(SASRecConfig(), num_items) if needed else None
        return kind(config, backbone, TokenTable.of([]), sasrec)  # type: ignore[arg-type]


def _llamarec(config: LlamaRecConfig, backbone: Backbone, num_items: int) -> Skeleton:
    model = llamarec_skeleton(config, backbone, num_items).train()
    count, learns_text = config.prompts.num_candidates, config.objective == "published"

    def batch(rows: int, length: int) -> RankingBatch:
        ids = torch.ones(rows, length, dtype=torch.int64)
        candidates = torch.ones(rows, count, dtype=torch.int64)
        ends = torch.arange(1, rows + 1) * length - 2  # an answer's token may follow
        return RankingBatch(
            *(ids, ids.clone(), ends, candidates, candidates.clone()),
            index_slots=torch.arange(rows * count) if isinstance(model.head, VectorHead) else None,
            answers=torch.zeros(rows, dtype=torch.int64),
            count=rows,
        )

    return Skeleton(model, batch, vocabulary(backbone) if learns_text else count)


def llamarec_skeleton(config: LlamaRecConfig, backbone: Backbone, num_items: int, device: str = "meta") -> LlamaRec:
    """LlamaRec with letters, or vectors where those are asked for; item vectors are as wide as the backbone."""
    count, width = config.prompts.num_candidates, causal_model(backbone).config.get_text_config().hidden_size
    vectors = config.identifiers == "vectors" or (config.identifiers == "auto" and count > len(LETTERS))
    with torch.device(device):
        table = torch.empty(num_items + 1, width) if config.scoring == "dot" else None
        letters = None if vectors else np.arange(count)
        return LlamaRec(config, backbone, num_items, letters, end_id=0, item_table=table)


def _rankllm(config: RankLLMConfig, backbone: Backbone) -> Skeleton:
    writes = config.objective in ("generation", "combined")

    def batch(rows: int, length: int) -> RankedBatch:
        slots = torch.zeros(rows, dtype=torch.int64)
        answer = torch.zeros(rows * min(length, ANSWER_TOKENS * config.shown) * writes, dtype=torch.int64)
        ids, ranks = torch.zeros(rows, length, dtype=torch.int64), torch.ones(rows, config.shown, dtype=torch.int64)
        return RankedBatch(ids, torch.ones_like(ids), slots, ranks, answer, answer.clone(), count=rows)

    return Skeleton(RankLLMSkeleton(config, backbone).train(), batch, vocabulary(backbone))


class RankLLMSkeleton(RankLLM):
    """RankLLM's training pass; the prompts, which only scoring needs, are left out."""

    def __init__(self, config: RankLLMConfig, backbone: Backbone) -> None:
        nn.Module.__init__(self)
        self.config, self.backbone = config, backbone
        self.encoder = cast(ListwiseEncoder, SimpleNamespace(single_names=lambda count: list(range(count))))


class BIGRecSkeleton(BIGRec):
    """BIGRec's training pass; what only scoring needs (the titles' trie, the grounding) is left out."""

    def __init__(self, config: BIGRecConfig, backbone: Backbone, num_items: int, device: str = "meta") -> None:
        nn.Module.__init__(self)
        self.config, self.backbone = config, backbone
        if config.objective == "items":
            width = causal_model(backbone).config.get_text_config().hidden_size
            with torch.device(device):
                self.item_head = ItemHead(torch.empty(num_items + 1, width))


class NextToken(Recommender):
    """A backbone that predicts the next token at every position."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def loss(self, batch: PromptBatch) -> Loss:  # type: ignore[override]
        assert batch.labels is not None
        decoder = decoder_of(self.backbone)
        with self._gate(len(batch.input_ids)):
            states = decoder.body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        total = losses.full_cross_entropy(states.flatten(0, 1), decoder.weight, batch.labels.flatten())
        return Loss(total, batch.count)

    def _gate(self, rows: int) -> AbstractContextManager[None]:
        """Stand in for what a method makes from its users' states, gradient included."""
        gate = find_gate(self.backbone)
        if gate is None:
            return nullcontext()
        return gate.use(torch.full((rows, gate.num_experts), 1 / gate.num_experts, requires_grad=True))

    def scores(self, batch: PromptBatch) -> Tensor:  # type: ignore[override]
        raise NotImplementedError("a skeleton is only trained")


def vocabulary(backbone: Backbone) -> int:
    return causal_model(backbone).config.get_text_config().vocab_size


def prompts(rows: int, length: int) -> PromptBatch:
    """Return [rows, length] fake tokens with a label at each."""
    ids = torch.ones(rows, length, dtype=torch.int64)
    return PromptBatch(ids, ids.clone(), ids.clone(), ids.clone(), count=rows * length)
