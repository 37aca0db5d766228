"""Models without weights of recommenders that read item ids, and of their students."""

from dataclasses import replace

import torch

from data.batches import SequenceBatch
from models.backbone import BackboneConfig
from models.dllm2rec import DLLM2RecConfig
from models.sequence_recommender import SequenceConfig

from ..sequences import sequence_recommender
from .base import Skeleton


def sequences(config: SequenceConfig, backbone: BackboneConfig | None, num_items: int) -> Skeleton:
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


def student(config: DLLM2RecConfig, backbone: BackboneConfig | None, num_items: int) -> Skeleton:
    return replace(sequences(config.student, None, num_items), left_out="what the teacher adds to the loss")
