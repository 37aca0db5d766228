"""Models without weights that read item vectors: E4SRec, LLaRA, iLoRA."""

from dataclasses import replace
from typing import Literal

import torch

from data.batches import PromptBatch, SequenceBatch
from data.item_prompts import ItemPromptBatch
from data.title_tokens import TokenTable
from models.backbone import Backbone, BackboneConfig, causal_model
from models.e4srec import E4SRec, E4SRecConfig
from models.item_embeddings import ItemTable, ItemTableConfig
from models.llara import ILoRA, ILoRAConfig, LLaRA, LLaRAConfig
from models.sasrec import SASRec, SASRecConfig
from models.skeleton import backbone_skeleton

from .base import Skeleton, prompts, vocabulary

SASREC_WIDTH = SASRecConfig().hidden_size  # of item vectors that are read from a run


def e4srec(config: E4SRecConfig, base: BackboneConfig | None, num_items: int) -> Skeleton:
    assert base is not None
    backbone = backbone_skeleton(base, head=False)
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


def llara(config: LLaRAConfig, base: BackboneConfig | None, num_items: int) -> Skeleton:
    assert base is not None
    backbone = backbone_skeleton(base)
    model = llara_skeleton(config, backbone, num_items).train()
    shown = config.prompts

    def batch(rows: int, length: int) -> PromptBatch:
        slots = torch.zeros(rows * (shown.history_length + shown.num_candidates), dtype=torch.int64)
        items = torch.ones(rows, shown.history_length, dtype=torch.int64)
        history = SequenceBatch(items, torch.full((rows,), shown.history_length))
        return replace(prompts(rows, length), item_slots=slots, slot_items=torch.ones_like(slots), history=history)

    return Skeleton(model, batch, vocabulary(backbone))


def llara_skeleton(config: LLaRAConfig, backbone: Backbone, num_items: int, device: str = "meta") -> LLaRA:
    """LLaRA or iLoRA around a SASRec of the default shape; the titles, which only scoring needs, are left out."""
    needed = config.sasrec is not None or config.prompts.mode != "text" or isinstance(config, ILoRAConfig)
    kind = ILoRA if isinstance(config, ILoRAConfig) else LLaRA
    with torch.device(device):
        sasrec = SASRec(SASRecConfig(), num_items) if needed else None
        return kind(config, backbone, TokenTable.of([]), sasrec)  # type: ignore[arg-type]
