"""LLaRA and iLoRA: a language model names the next item out of candidates that it sees as titles and as vectors.

Sources: Liao et al., "LLaRA: Large Language-Recommendation Assistant", arXiv 2312.02445; Kong et al., "Customizing
Language Models with Instance-wise LoRA for Sequential Recommendation", arXiv 2408.10159. iLoRA is LLaRA with a gated
adapter whose gate is made of the user's state.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.batches import PromptBatch, SequenceBatch
from data.candidate_rows import CandidateSettings
from data.title_tokens import TokenTable

from . import losses
from .backbone import Backbone, causal_model
from .base import Loss, Recommender
from .candidate_scoring import candidate_log_likelihoods, greedy_answers
from .decoder import decoder_of, scoring_decoder
from .expert_gates import ExpertGate, GateConfig, gate_parts
from .item_embeddings import make_projector, put_vectors
from .moe_lora import gate_of
from .sequence_recommender import SequenceRecommender


@dataclass
class LLaRAConfig:
    """Prompts, the ID recommender inside, and how candidates are ranked."""

    prompts: CandidateSettings = field(default_factory=CandidateSettings)
    """How histories and candidates are written, and the curriculum from text to vectors."""
    sasrec: Path | None = None
    """Run folder of a sasrec, gru4rec or lrurec run, or the .safetensors weights of an encoder that LLaRA ships. Not
    needed for --method.prompts.mode text."""
    train_sasrec: bool = False
    """Train the ID recommender too, as far as it is read (its rate: --train.lr_multipliers); else it is kept as it is,
    without dropout."""
    vectors: Literal["table", "states"] = "table"
    """What stands for an item of the history: its row of the item table, as published, or the sequence state behind it.
    Candidates have their rows."""
    projector: Literal["linear", "mlp"] = "mlp"
    """Map of item vectors to the backbone's width; mlp is linear, GELU, linear, as published."""
    scoring: Literal["likelihood", "generate"] = "likelihood"
    """likelihood: candidates are ranked by the log-likelihood of their titles. generate: the title that greedy decoding
    writes comes first, as published; where it names no candidate, all tie."""
    max_new_tokens: int = 64
    """Most tokens that generate writes."""


@dataclass
class ILoRAConfig(LLaRAConfig):
    """LLaRA's settings and the gate's."""

    gate: GateConfig = field(default_factory=GateConfig)
    """How the user's state mixes the experts of --backbone.adapter moe-lora."""


class LLaRA(Recommender):
    """Scores the candidates that a prompt offers; all other items are at -inf."""

    def __init__(
        self, config: LLaRAConfig, backbone: Backbone, responses: TokenTable, sasrec: SequenceRecommender | None
    ) -> None:
        super().__init__()
        self.config, self.backbone, self.responses, self.sasrec = config, backbone, responses, sasrec
        if sasrec is None:
            if config.prompts.mode != "text":
                raise ValueError(
                    f"--method.prompts.mode {config.prompts.mode} shows item vectors: pass --method.sasrec, the run "
                    "folder of a sasrec, gru4rec or lrurec run, or --method.prompts.mode text"
                )
            return
        sasrec.requires_grad_(False)
        if config.train_sasrec:
            for parameter in self.read_parameters(sasrec):
                parameter.requires_grad_()
        if config.prompts.mode != "text":
            width = causal_model(backbone).config.get_text_config().hidden_size
            self.projector = make_projector(config.projector, sasrec.item_table.shape[1], width)

    @property
    def reads_states(self) -> bool:
        """Whether the ID recommender encodes histories; otherwise its item table is all that is read."""
        return self.config.vectors == "states" and self.config.prompts.mode != "text"

    def read_parameters(self, sasrec: SequenceRecommender) -> list[nn.Parameter]:
        """Return what of the ID recommender gets a gradient in every step, which DDP insists on for what is trained."""
        if self.reads_states:
            return sasrec.read_by_states()
        if self.config.prompts.mode == "text":
            raise ValueError("--method.train_sasrec true: --method.prompts.mode text reads nothing of --method.sasrec")
        return [sasrec.get_parameter("item_embedding.weight")]

    def train(self, mode: bool = True) -> Self:
        """Switch to training; an ID recommender that is not trained stays as it is evaluated."""
        super().train(mode)
        if self.sasrec is not None and not self.config.train_sasrec:
            self.sasrec.eval()
        return self

    def loss(self, batch: PromptBatch) -> Loss:  # type: ignore[override]
        assert batch.labelled is not None
        assert batch.targets is not None
        decoder = decoder_of(self.backbone)
        with self.adapted(batch):
            # Pads stand on the right, where a causal model never sees them.
            states = decoder.body(inputs_embeds=self.embed(batch), use_cache=False).last_hidden_state
            parts = self.parts(batch)
        states = states.flatten(0, 1).index_select(0, batch.labelled)
        total = losses.full_cross_entropy(states, decoder.weight, batch.targets)
        return Loss(total, batch.count, parts)

    def scores(self, batch: PromptBatch) -> Tensor:  # type: ignore[override]
        if batch.candidates is None:
            raise ValueError(
                "this model ranks the candidates that its prompts offer, not a catalogue: pass "
                "--evaluation.protocol candidates-20 (launch/evaluate.py: --protocol candidates-20)"
            )
        if self.config.scoring == "generate":
            found = self.named(batch).float()
        else:
            with self.adapted(batch):
                prompt = scoring_decoder(self.backbone), self.embed(batch), batch.attention_mask
                found = candidate_log_likelihoods(*prompt, self.responses, batch.candidates)
        scores = found.new_full((len(found), len(self.responses)), -torch.inf)
        return scores.scatter(1, batch.candidates, found)

    def answers(self, batch: PromptBatch) -> list[list[int]]:
        """Return the tokens that greedy decoding writes after each prompt, up to the end of a line."""
        assert batch.candidates is not None
        with self.adapted(batch):
            prompt = scoring_decoder(self.backbone), self.embed(batch), batch.attention_mask
            return greedy_answers(*prompt, int(self.responses[1][-1]), self.config.max_new_tokens)

    def named(self, batch: PromptBatch) -> Tensor:
        """Return [B, C] bool: the candidates whose whole title the model writes."""
        assert batch.candidates is not None
        written = self.answers(batch)
        rows = zip(batch.candidates.tolist(), written, strict=True)
        hits = [[self.responses[item].tolist() == answer for item in candidates] for candidates, answer in rows]
        return torch.tensor(hits, device=batch.candidates.device)

    def embed(self, batch: PromptBatch) -> Tensor:
        """Return the prompts as the backbone reads them, [B, L, H], item vectors in their slots."""
        embeds = causal_model(self.backbone).get_input_embeddings()(batch.input_ids)
        if self.config.prompts.mode == "text":
            return embeds
        assert self.sasrec is not None
        assert batch.item_slots is not None
        assert batch.slot_items is not None
        vectors = F.embedding(batch.slot_items, self.sasrec.item_table)
        if self.config.vectors == "states":
            assert batch.history is not None
            states = self.sasrec.states(batch.history)
            vectors = with_states(vectors, batch.item_slots // batch.input_ids.shape[1], states, batch.history.lengths)
        return put_vectors(embeds, batch.item_slots, self.projector(vectors))

    def adapted(self, batch: PromptBatch) -> AbstractContextManager[None]:
        """Passes inside belong to the users of this batch."""
        return nullcontext()

    def parts(self, batch: PromptBatch) -> dict[str, Tensor]:
        """Return what is logged beside the loss."""
        return {}


class ILoRA(LLaRA):
    """LLaRA whose low-rank update is made for each user: experts mixed by a gate of the user's state."""

    def __init__(
        self, config: ILoRAConfig, backbone: Backbone, responses: TokenTable, sasrec: SequenceRecommender | None
    ) -> None:
        if sasrec is None:
            raise ValueError(
                "ilora makes its gate of the user's state: pass --method.sasrec, a run folder of an ID recommender"
            )
        super().__init__(config, backbone, responses, sasrec)
        self.active = gate_of(causal_model(backbone))
        sizes = sasrec.item_table.shape[1], self.active.num_experts, self.active.num_layers
        self.gate = ExpertGate(config.gate, *sizes)
        self.saved_buffers = tuple(f"gate.{name}" for name in self.gate.saved_buffers)

    @property
    def reads_states(self) -> bool:
        return True

    def adapted(self, batch: PromptBatch) -> AbstractContextManager[None]:
        assert self.sasrec is not None
        assert batch.history is not None
        return self.active.use(self.gate(user_states(self.sasrec, batch.history)))

    def parts(self, batch: PromptBatch) -> dict[str, Tensor]:
        assert isinstance(self.active.state, Tensor)
        return gate_parts(self.active.state, batch.count)


def user_states(sasrec: SequenceRecommender, history: SequenceBatch) -> Tensor:
    """Return the state after each user's last event, [B, S]; zero for a user without events."""
    states = sasrec.user_states(history)
    return states.masked_fill((history.lengths == 0)[:, None], 0.0)


def with_states(vectors_SD: Tensor, row_S: Tensor, states_BLD: Tensor, length_B: Tensor) -> Tensor:
    """Put the sequence states in place of the rows' first vectors, which are those of the history, oldest first.

    Rows have their slots one behind the other; a row may have none.
    """
    slots = torch.zeros(len(length_B), dtype=torch.int64, device=row_S.device)
    slots.index_add_(0, row_S, torch.ones_like(row_S))
    place_S = torch.arange(len(row_S), device=row_S.device) - (slots.cumsum(0) - slots)[row_S]
    state_SD = states_BLD[row_S, place_S.clamp(max=states_BLD.shape[1] - 1)]
    return torch.where((place_S < length_B[row_S])[:, None], state_SD.to(vectors_SD.dtype), vectors_SD)
