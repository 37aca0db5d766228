"""Models without weights that turn texts into vectors: dense retrieval, and the stages before it."""

import math

import numpy as np
import torch
from torch import Tensor

from data.retrieval_examples import RetrievalBatch
from data.retrieval_texts import RetrievalTexts
from data.stage_examples import MaskedBatch, WholeTextBatch
from data.texts import TextBatch
from data.title_tokens import TokenTable
from models.backbone import Backbone, BackboneConfig, causal_model
from models.dense_retrieval import DenseRetrieval
from models.dense_retrieval_config import DenseRetrievalConfig
from models.mntp import MNTP, MNTPConfig
from models.simcse import SimCSE, SimCSEConfig
from models.skeleton import backbone_skeleton
from models.text_encoder import TextEncoder

from ..llm2vec import both_ways, with_dropout
from .base import TITLE_TOKENS, Skeleton, fake_texts, vocabulary


def dense_retrieval(config: DenseRetrievalConfig, backbone: BackboneConfig | None, num_items: int) -> Skeleton:
    assert backbone is not None
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


def mntp(config: MNTPConfig, base: BackboneConfig | None, num_items: int) -> Skeleton:
    assert base is not None
    backbone = backbone_skeleton(both_ways(base))

    def batch(rows: int, length: int) -> MaskedBatch:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        masked = torch.zeros(math.ceil(config.masking.rate * rows * length), dtype=torch.int64)
        return MaskedBatch(ids, torch.ones_like(ids), masked, masked.clone(), count=len(masked))

    return Skeleton(MNTP(backbone).train(), batch, vocabulary(backbone))


def simcse(config: SimCSEConfig, base: BackboneConfig | None, num_items: int) -> Skeleton:
    assert base is not None
    backbone = backbone_skeleton(with_dropout(base), head=False)

    def batch(rows: int, length: int) -> WholeTextBatch:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return WholeTextBatch(TextBatch(ids, torch.ones_like(ids), torch.ones_like(ids)), count=rows)

    width = causal_model(backbone).config.get_text_config().hidden_size
    return Skeleton(SimCSE(config, TextEncoder(backbone, config.pooling)).train(), batch, width)
