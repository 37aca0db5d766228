"""Masked next-token prediction: a decoder that sees both ways learns to use what follows. The first stage of LLM2Vec.

Source: BehnamGhader et al., "LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders", arXiv 2404.05961.
"""

from dataclasses import dataclass, field

from data.corpus import CorpusSettings
from data.stage_examples import MaskedBatch, MaskingSettings

from . import losses
from .backbone import Backbone
from .base import Loss, Stage
from .decoder import decoder_of


@dataclass
class MNTPConfig:
    """Texts, and what of them is masked."""

    texts: CorpusSettings = field(default_factory=CorpusSettings)
    """What is learned from, as `--model dense-retrieval` will read it."""
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    """Which tokens are predicted."""


class MNTP(Stage):
    """A bidirectional decoder with its head: a masked token is predicted from the state before it, as in writing."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def loss(self, batch: MaskedBatch) -> Loss:  # type: ignore[override]
        decoder = decoder_of(self.backbone)
        states = decoder.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        states_TH = states.last_hidden_state.flatten(0, 1).index_select(0, batch.labelled)
        total = losses.full_cross_entropy(states_TH, decoder.weight, batch.targets)
        if self.training:  # where logits are made for the loss alone
            return Loss(total, batch.count)
        return Loss(total, batch.count, {"accuracy": losses.count_first(states_TH, decoder.weight, batch.targets)})
