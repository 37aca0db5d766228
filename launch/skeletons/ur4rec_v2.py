"""UR4Rec V2 without weights."""

import torch

from data.batches import SequenceBatch
from data.preference_batches import PreferenceBatch
from models.backbone import BackboneConfig
from models.sasrec import SASRec, SASRecConfig
from models.ur4rec.v2 import UR4RecV2
from models.ur4rec.v2_config import UR4RecV2Config

from .base import Skeleton

MINILM_WIDTH = 384  # of the texts' vectors


def ur4rec_v2(config: UR4RecV2Config, backbone: BackboneConfig | None, num_items: int) -> Skeleton:
    drawn = config.num_negatives
    with torch.device("meta"):
        texts = torch.zeros(num_items + 1, MINILM_WIDTH, dtype=torch.float16)
        model = UR4RecV2(config, SASRec(SASRecConfig(), num_items), texts, num_users=1).train()

    def batch(rows: int, length: int) -> PreferenceBatch:
        rows *= config.cuts  # a row of a micro-batch is a user
        each = torch.zeros(rows, dtype=torch.int64)
        return PreferenceBatch(
            SequenceBatch(items=torch.zeros(rows, length, dtype=torch.int64), lengths=each),
            users=each,
            cuts=each,
            sentences=torch.zeros(rows, config.profile_sentences, dtype=torch.int64),
            vectors=torch.zeros(rows * config.profile_sentences, MINILM_WIDTH, dtype=torch.float16),
            targets=each + 1,
            taken=torch.ones(2, rows, dtype=torch.int64),
            negatives=torch.zeros(rows, drawn, dtype=torch.int64) if drawn else None,
            count=rows,
        )

    left_out = "SASRec's own width, 64 here" + ("; the text encoder" if config.train == "end-to-end" else "")
    return Skeleton(model, batch, drawn or num_items, left_out)
