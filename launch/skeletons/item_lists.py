"""Models without weights that rank lists of candidates by their ids and by texts."""

import torch

from data.batches import SequenceBatch
from data.candidate_lists import CandidateBatch
from models.backbone import BackboneConfig
from models.base import Recommender
from models.ur4rec.reranking import UR4Rec, UR4RecConfig, UR4RecPretrain, UR4RecPretrainConfig

from .base import Skeleton

TEXT_WIDTH = 384  # of a description's vector, as MiniLM gives it


def ur4rec(config: UR4RecConfig | UR4RecPretrainConfig, backbone: BackboneConfig | None, num_items: int) -> Skeleton:
    with torch.device("meta"):
        model: Recommender
        if isinstance(config, UR4RecConfig):
            model = UR4Rec(config, num_items, TEXT_WIDTH)
        else:
            model = UR4RecPretrain(config, num_items, TEXT_WIDTH)

    def batch(rows: int, length: int) -> CandidateBatch:
        return CandidateBatch(
            history=SequenceBatch(torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)),
            candidates=torch.zeros(rows, config.num_candidates, dtype=torch.int64),
            texts=torch.zeros(rows, 1 + length, TEXT_WIDTH, dtype=torch.float16),
            answers=torch.zeros(rows, dtype=torch.int64),
            count=rows,
        )

    left_out = "the text encoder" if config.preferences.encoder_layers else ""
    return Skeleton(model.train(), batch, config.num_candidates, left_out)
