"""What a model without weights is, and what several of them are made of."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batches import PromptBatch
from data.texts import TextBatch
from models import losses
from models.backbone import Backbone, BackboneConfig, causal_model
from models.base import Loss, Recommender
from models.decoder import decoder_of
from models.moe_lora import find_gate
from models.skeleton import backbone_skeleton

TITLE_TOKENS = 16  # of an item's text


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, its training batch, and how wide its logits are."""

    model: Recommender
    batch: Callable[[int, int], Any]  # (rows, length) -> a batch whose every position has a label
    classes: int
    left_out: str = ""  # what of the model is missing, in words


class NextToken(Recommender):
    """A backbone that predicts the next token at every position."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def loss(self, batch: PromptBatch) -> Loss:  # type: ignore[override]
        assert batch.targets is not None
        decoder = decoder_of(self.backbone)
        with self._gate(len(batch.input_ids)):
            states = decoder.body(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        total = losses.full_cross_entropy(states.flatten(0, 1), decoder.weight, batch.targets)
        return Loss(total, batch.count)

    def _gate(self, rows: int) -> AbstractContextManager[None]:
        """Stand in for what a method makes from its users' states, gradient included."""
        gate = find_gate(self.backbone)
        if gate is None:
            return nullcontext()
        return gate.use(torch.full((rows, gate.num_experts), 1 / gate.num_experts, requires_grad=True))

    def scores(self, batch: PromptBatch) -> Tensor:  # type: ignore[override]
        raise NotImplementedError("a skeleton is only trained")


def next_token(method: Any, backbone: BackboneConfig | None, num_items: int) -> Skeleton:
    """A method without a skeleton of its own, as far as its backbone goes."""
    assert backbone is not None
    model = backbone_skeleton(backbone)
    return Skeleton(NextToken(model), prompts, vocabulary(model), "what it trains beside the backbone")


def vocabulary(backbone: Backbone) -> int:
    return causal_model(backbone).config.get_text_config().vocab_size


def prompts(rows: int, length: int) -> PromptBatch:
    """Return [rows, length] fake tokens with a label at each."""
    ids, slots = torch.ones(rows, length, dtype=torch.int64), torch.arange(rows * length)
    return PromptBatch(ids, ids.clone(), slots, torch.ones_like(slots), count=rows * length)


def fake_texts(rows: int, length: int) -> TextBatch:
    """Return [rows, length] tokens, one of them padding: without any, attention would do without a mask."""
    ids = torch.ones(rows, length, dtype=torch.int64)
    mask = ids.clone()
    mask[0, -1] = 0
    return TextBatch(ids, mask, mask.clone())
