"""Models without weights that read and write titles and letters: BIGRec, LlamaRec, RankLLM."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from torch import nn

from data.identifiers import LETTERS
from data.listwise_batches import RankedBatch
from data.listwise_prompts import ListwiseEncoder
from data.ranking_batches import RankingBatch
from models.backbone import Backbone, BackboneConfig, causal_model
from models.bigrec import BIGRec, BIGRecConfig, ItemHead
from models.llamarec import LlamaRec, LlamaRecConfig, VectorHead
from models.rankllm import RankLLM, RankLLMConfig
from models.skeleton import backbone_skeleton

from .base import Skeleton, prompts, vocabulary

ANSWER_TOKENS = 4  # of each candidate in a written permutation: "[", "A", "]", " >"


def bigrec(config: BIGRecConfig, base: BackboneConfig | None, num_items: int) -> Skeleton:
    assert base is not None
    backbone = backbone_skeleton(base)
    model = BIGRecSkeleton(config, backbone, num_items).train()
    classes = num_items if config.objective == "items" else vocabulary(backbone)
    return Skeleton(model, prompts, classes)


class BIGRecSkeleton(BIGRec):
    """BIGRec's training pass; what only scoring needs (the titles' trie, the grounding) is left out."""

    def __init__(self, config: BIGRecConfig, backbone: Backbone, num_items: int, device: str = "meta") -> None:
        nn.Module.__init__(self)
        self.config, self.backbone = config, backbone
        if config.objective == "items":
            width = causal_model(backbone).config.get_text_config().hidden_size
            with torch.device(device):
                self.item_head = ItemHead(torch.empty(num_items + 1, width))


def llamarec(config: LlamaRecConfig, base: BackboneConfig | None, num_items: int) -> Skeleton:
    assert base is not None
    backbone = backbone_skeleton(base, head=config.scoring == "identifiers")
    model = llamarec_skeleton(config, backbone, num_items).train()
    count, learns_text = config.prompts.num_candidates, config.objective == "published"

    def batch(rows: int, length: int) -> RankingBatch:
        ids = torch.ones(rows, length, dtype=torch.int64)
        candidates = torch.ones(rows, count, dtype=torch.int64)
        mask = ids.clone()
        mask[:, -1] = 0  # rows are padded: a mask of ones would not be kept
        ends = torch.arange(1, rows + 1) * length - 2  # an answer's token may follow
        return RankingBatch(
            *(ids, mask, ends, candidates, candidates.clone()),
            index_slots=torch.arange(rows * count) if isinstance(model.head, VectorHead) else None,
            answers=torch.zeros(rows, dtype=torch.int64),
            count=rows * (2 if learns_text else 1),
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


def rankllm(config: RankLLMConfig, base: BackboneConfig | None, num_items: int) -> Skeleton:
    assert base is not None
    backbone = backbone_skeleton(base)
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
