"""iLoRA without generation: a language model reads an ID recommender's states, and its own state retrieves the item.

E4SRec's prompts and ranking around LLaRA's inner recommender and iLoRA's gate (arXiv 2312.02443, 2312.02445,
2408.10159). Items live in the recommender's space and states in the backbone's; `space` says where they meet, and
distillation draws the model towards what the recommender itself thinks of a user.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import SequenceBatch
from data.item_prompts import ItemPromptBatch

from . import losses
from .backbone import Backbone, causal_model
from .base import Loss
from .e4srec import ItemReader, ItemReaderConfig, token_norm
from .expert_gates import ExpertGate, GateConfig, gate_parts
from .item_embeddings import ItemMatcher, Match, ProjectedTable, make_projector, scaled
from .moe_lora import find_gate
from .sequence_recommender import SequenceRecommender

NORM_SAMPLE = 256  # items whose states tell the norm of states


@dataclass
class ILoRAItemsConfig(ItemReaderConfig):
    """E4SRec's prompts and losses, the ID recommender inside, and where its items are matched."""

    sasrec: Path | None = None
    """Run folder of a sasrec, gru4rec or lrurec run, or the .safetensors weights of an encoder that LLaRA ships."""
    train_sasrec: bool = False
    """Train the ID recommender too, as far as it is read (its rate: --train.lr_multipliers); else it is kept as it is,
    without dropout."""
    vectors: Literal["table", "states"] = "states"
    """What stands for an item of the history: its row of the item table, or the sequence state behind it."""
    projector: Literal["linear", "mlp"] = "mlp"
    """Map between the two spaces, in each direction; mlp is linear, GELU, linear."""
    space: Literal["backbone", "sasrec"] = "backbone"
    """Where states meet items: backbone projects the item table with the map of what is read; sasrec maps states to the
    item table's width, by a projector of its own."""
    match: Match = "dot"
    """dot products, or cosine with a learned scale."""
    gate: GateConfig = field(default_factory=GateConfig)
    """How the user's state mixes the experts of --backbone.adapter moe-lora."""
    distillation: Literal["none", "mse", "cosine", "kl"] = "none"
    """mse (the mean over the width) and cosine (1 - cosine) bring the mapped state to the recommender's state, kl the
    distribution over the catalogue to the recommender's."""
    distillation_weight: float = 1.0
    """Weight of distillation beside the ranking loss."""
    temperature: float = 1.0
    """Of both distributions in kl."""

    def __post_init__(self) -> None:
        if self.distillation in ("mse", "cosine") and self.space != "sasrec":
            raise ValueError(
                f"--method.distillation {self.distillation} compares states in the recommender's space: pass "
                "--method.space sasrec, or --method.distillation kl"
            )
        if self.distillation_weight <= 0 or self.temperature <= 0:
            raise ValueError(
                f"--method.distillation_weight {self.distillation_weight} and --method.temperature {self.temperature}: "
                "expected above 0; --method.distillation none leaves it out"
            )


class SASRecTable(ProjectedTable):
    """The item table of the ID recommender, which owns it: no copy, and no second name among the parameters."""

    def __init__(self, sasrec: SequenceRecommender, projector: nn.Module) -> None:
        super().__init__(projector)
        self.owner = (sasrec,)  # in a tuple, which modules do not look into

    @property
    def table(self) -> Tensor:
        return self.owner[0].item_table


class ILoRAItems(ItemReader):
    """Ranks the catalogue by the state of a backbone that has read an ID recommender's states."""

    def __init__(self, config: ILoRAItemsConfig, backbone: Backbone, sasrec: SequenceRecommender) -> None:
        width, own_width = causal_model(backbone).config.get_text_config().hidden_size, sasrec.item_table.shape[1]
        table = SASRecTable(sasrec, make_projector(config.projector, own_width, width))
        output = ItemMatcher(table, config.match)
        if config.space == "sasrec":
            turned = make_projector(config.projector, width, own_width)
            output = ItemMatcher(SASRecTable(sasrec, nn.Identity()), config.match, turned)
        super().__init__(config, backbone, table, output)
        self.config, self.sasrec = config, sasrec
        self.active, self.gate = find_gate(causal_model(backbone)), None
        if self.active is not None:
            self.gate = ExpertGate(config.gate, own_width, self.active.num_experts, self.active.num_layers)
            self.saved_buffers = tuple(f"gate.{name}" for name in self.gate.saved_buffers)
        read = example_states(sasrec.eval()) if config.vectors == "states" else sasrec.item_table
        scaled(read, table.projector, token_norm(backbone))
        sasrec.requires_grad_(False)
        if config.train_sasrec:
            # DDP waits for every weight that is trained, so only what gets a gradient is.
            reads_states = config.vectors == "states" or self.gate is not None
            for parameter in (sasrec.item_embedding.weight, *(sasrec.read_by_states() if reads_states else ())):
                parameter.requires_grad_()

    def train(self, mode: bool = True) -> Self:
        """Switch to training; an ID recommender that is not trained stays as it is evaluated."""
        super().train(mode)
        if not self.config.train_sasrec:
            self.sasrec.eval()
        return self

    def loss(self, batch: ItemPromptBatch) -> Loss:  # type: ignore[override]
        events_BED = self.events(batch)
        gate = self.mix(events_BED, batch)
        states_TH = self.read_events(batch, events_BED, gate)
        total = self.ranking_loss(states_TH, batch)
        parts = {} if gate is None else gate_parts(gate, batch.count)
        if self.config.distillation != "none":
            distance = self.distillation_loss(states_TH, events_BED, batch)
            parts |= {"ranking": total.detach(), "distillation": distance.detach()}
            total = total + self.config.distillation_weight * distance
        return Loss(total, batch.count, parts)

    def read(self, batch: ItemPromptBatch) -> Tensor:
        events_BED = self.events(batch)
        return self.read_events(batch, events_BED, self.mix(events_BED, batch))

    def events(self, batch: ItemPromptBatch) -> Tensor:
        """Return the ID recommender's state after every event of the histories, [B, E, D]."""
        assert batch.history is not None
        return self.sasrec.states(batch.history)

    def mix(self, events_BED: Tensor, batch: ItemPromptBatch) -> Tensor | None:
        """Return the gate of each row, made from its user's state; None where the backbone has no experts."""
        if self.gate is None:
            return None
        assert batch.history is not None
        rows = torch.arange(len(events_BED), device=events_BED.device)
        return self.gate(states_after(events_BED, rows, batch.history.lengths))

    def read_events(self, batch: ItemPromptBatch, events_BED: Tensor, gate: Tensor | None) -> Tensor:
        """Return the backbone's states at the labelled slots, [T, H]."""
        if self.config.vectors == "states":
            vectors = self.input.projector(states_after(events_BED, *items_up_to(batch.item_slots, batch)))
        else:
            vectors = self.input(batch.slot_items)
        with nullcontext() if self.active is None or gate is None else self.active.use(gate):
            return self.read_vectors(batch, vectors)

    def distillation_loss(self, states_TH: Tensor, events_BED: Tensor, batch: ItemPromptBatch) -> Tensor:
        """Return the summed distance of the labels' states from the ID recommender's, which gets no gradient."""
        row_T, count_T = items_up_to(batch.labelled, batch)
        if self.config.prompts.empty_history:  # the recommender knows nothing of a user without a history
            states_TH, row_T, count_T = (values[count_T > 0] for values in (states_TH, row_T, count_T))
        teacher_TD = states_after(events_BED, row_T, count_T).detach()
        if self.config.distillation == "kl":
            query, table = self.output.operands(states_TH)
            teacher_TD, teacher_ND = self.sasrec.operands(teacher_TD)
            return losses.kl_divergence(query, table, teacher_TD, teacher_ND[1:], self.config.temperature)
        mapped_TD = self.output.state_projector(states_TH).to(teacher_TD.dtype)
        if self.config.distillation == "cosine":
            return (1 - F.cosine_similarity(mapped_TD, teacher_TD, dim=1)).sum()
        return (mapped_TD - teacher_TD).square().mean(dim=1).sum()


def items_up_to(slots_T: Tensor, batch: ItemPromptBatch) -> tuple[Tensor, Tensor]:
    """Return the row of each slot, and how many items of that row stand at or before it, both [T]."""
    length = batch.input_ids.shape[1]
    row_T = slots_T // length
    before_row = torch.searchsorted(batch.item_slots, row_T * length)
    return row_T, torch.searchsorted(batch.item_slots, slots_T, right=True) - before_row


def states_after(events_BED: Tensor, row_T: Tensor, count_T: Tensor) -> Tensor:
    """Return the state after the first `count` events of a row, [T, D]; zero before the first one."""
    return events_BED[row_T, (count_T - 1).clamp(min=0)].masked_fill((count_T == 0)[:, None], 0.0)


@torch.no_grad()
def example_states(sasrec: SequenceRecommender) -> Tensor:
    """Return states after one event, of some items, behind a row for padding: [n + 1, D]."""
    items = torch.arange(1, len(sasrec.item_table), device=sasrec.item_table.device)
    items = items[:: max(1, len(items) // NORM_SAMPLE)]
    states = sasrec.states(SequenceBatch(items[:, None], torch.ones_like(items)))[:, 0]
    return F.pad(states, (0, 0, 1, 0))
