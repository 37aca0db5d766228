"""SimCSE without labels: a text is found among all others though dropout has changed it. The second stage of LLM2Vec.

Source: Gao, Yao and Chen, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", arXiv 2104.08821, section 3.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from data.corpus import CorpusSettings
from data.stage_examples import WholeTextBatch
from data.texts import TextBatch

from .base import Loss, Stage
from .contrastive import gather_rows, info_nce
from .pooling import Pooling
from .text_encoder import TextEncoder

PUBLISHED_DROPOUT = 0.3  # of LLM2Vec


@dataclass
class SimCSEConfig:
    """Texts, and how their vectors are compared."""

    texts: CorpusSettings = field(default_factory=CorpusSettings)
    """What is learned from, as `--model dense-retrieval` will read it."""
    pooling: Pooling = "mean"
    """One vector a text: the mean of its tokens' states, the mean with weights that grow, the last or the first one."""
    temperature: float = 0.05
    """Cosines are divided by it; LLM2Vec's scale of 20."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"--method.temperature is {self.temperature}, but must be above 0")


class SimCSE(Stage):
    """A text encoder whose every text is its own positive, and whose negatives are the others, of all processes."""

    def __init__(self, config: SimCSEConfig, encoder: TextEncoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder

    def loss(self, batch: WholeTextBatch) -> Loss:  # type: ignore[override]
        texts = batch.texts
        tensors = (texts.input_ids, texts.attention_mask, texts.pool_mask)
        twice = TextBatch(*(torch.cat([tensor, tensor]) for tensor in tensors))
        views = nn.functional.normalize(self.encoder(twice), dim=1).chunk(2)
        query_BH, positive_BH = (view[: batch.count] for view in views)  # none of a muted batch
        gathered = gather_rows(positive_BH)
        with torch.autocast(query_BH.device.type, enabled=False):  # bfloat16 would be off by a tenth
            logits_BN = query_BH @ gathered.rows.T / self.config.temperature
        label_B = gathered.first + torch.arange(batch.count, device=query_BH.device)
        first = (logits_BN.detach().argmax(1) == label_B).sum() if batch.count else label_B.sum()
        return Loss(info_nce(logits_BN, label_B), batch.count, {"accuracy": first})

    def train(self, mode: bool = True) -> "SimCSE":
        """Its loss is made of dropout, which is therefore never off, not even on what is held out."""
        return super().train(True)
