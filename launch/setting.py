"""What the table of methods is made of: what a method is built from, and what building it gives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from data.batches import Examples
from data.candidate_store import CandidateStore, StoredPhase
from data.interactions import Catalog
from data.splits import Phase, Split
from data.tokenized import Prompts
from evaluation.results import Evaluation
from models.backbone import BackboneConfig
from models.base import Recommender

from .skeletons.base import Skeleton

HISTORIES = "histories"  # name of a split that is made of given histories, whose users no data set has


@dataclass(frozen=True)
class Setting:
    """What a method is built from: data, its own settings, and where its files are."""

    split: Split
    catalog: Catalog
    method: Any  # the method's own settings, an instance of Method.config
    backbone: BackboneConfig | None
    seed: int
    cache: Path  # where prepared prompts are kept
    load_model: Callable[[Path], "Built"]  # the model of an earlier run, from its folder
    is_main: bool = True
    saved: Path | None = None  # model folder of a finished run, when the model is built to be loaded


@dataclass(frozen=True)
class Reranking:
    """The two stages of a method that ranks what an earlier run retrieves."""

    candidates: Callable[[Split, StoredPhase], CandidateStore]  # of each row of a phase; collective
    listing: Callable[[Split, Phase, CandidateStore], Examples]  # examples that list these candidates in their order
    prompt: str  # a hash of all that prompts are made of, beside histories and candidates


@dataclass(frozen=True)
class EveryPosition:
    """How a model answers after every event of a window in one pass, where no event sees what stands behind it.

    Such a model has `read`, from a batch to its states at the labelled slots [T, H], and `operands`, from states to
    [T, D] and [N + 1, D], whose products are the scores.
    """

    window: int  # events
    examples: Callable[[Split, np.ndarray], Examples]  # of spans (user, start, end), labelled at their inputs, in order


@dataclass(frozen=True)
class Distilled:
    """What a student is without its teacher: what model/ holds, and later commands load."""

    name: str  # in launch/methods.py
    method: Any  # that method's settings
    plain_weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # from those of the trained model
    compare: Callable[[Evaluation], dict[str, Any]] | None  # with the teacher, on validation, where that is known
    top_k: int  # recommendations of each user that it compares


class CannotRank(ValueError):
    """A model was asked to rank the whole catalogue, and only ranks candidates, or nothing."""


@dataclass(frozen=True)
class Built:
    """A model with the examples that train and evaluate it; examples are made when they are asked for."""

    model: Recommender
    training: Callable[[], Examples]
    # Evaluation examples of a method that ranks the whole catalogue; None where it only ranks what a prompt offers, or
    # nothing.
    evaluation: Callable[[Split, Phase], Examples] | None
    tokenizer: PreTrainedTokenizerBase | None = None  # saved with the model
    # Chooses what is fitted on validation after training, from the prepared model, this process's batches and every
    # held-out item.
    calibrate: Callable[[nn.Module, Iterable[Any], np.ndarray], None] | None = None
    # Evaluation examples whose prompts offer these candidates, [n, C] with the target first.
    offering: Callable[[Split, Phase, np.ndarray], Examples] | None = None
    titles: Sequence[str] | None = None  # [N + 1] as such a prompt shows them
    # Lets a finished model rank the items that a longer catalogue adds; None where texts are not enough.
    add_items: Callable[[Catalog], None] | None = None
    # Of a stage that ranks nothing: labelled examples that are kept from training, whose loss selects its weights.
    held_out: Callable[[], Examples] | None = None
    # What a full ranking means beside its metrics, for results.json: figures of a method of two stages.
    summary: Callable[[Split, Evaluation], dict[str, Any]] | None = None
    reranking: Reranking | None = None  # what a method is made of that ranks an earlier run's candidates
    distilled: Distilled | None = None
    every_position: EveryPosition | None = None  # None where each history needs a pass of its own
    # Methods of the model, called through its forward, that give the scores of its parts alone, to be measured, too.
    parts: Mapping[str, str] = field(default_factory=dict)

    # Figures of all scoring since they were last asked for, over all processes: for the header of results. Collective.
    scoring_figures: Callable[[], dict[str, Any]] | None = None

    def evaluation_among(self, split: Split, phase: Phase, candidates: np.ndarray | None) -> Examples:
        """Return the examples that rank a phase's targets, among an evaluator's candidates or in the whole catalogue.

        Raises CannotRank where the model cannot rank the whole.
        """
        if self.offering is not None and candidates is not None:
            return self.offering(split, phase, candidates)
        return self.require_full_ranking()(split, phase)

    def require_full_ranking(self) -> Callable[[Split, Phase], Examples]:
        """Return `evaluation`; raise CannotRank where there is none."""
        if self.held_out is not None:
            raise CannotRank(
                "it is a stage, which prepares a later run and ranks nothing: of mntp and simcse, write the backbone "
                "out with launch/export.py --run RUN --to FOLDER, and train a method with --backbone.name FOLDER; "
                "ur4rec begins with a run of ur4rec-pretrain by --method.init"
            )
        if self.evaluation is None:
            raise CannotRank(
                "this model only ranks the candidates that its prompts offer: pass --evaluation.protocol candidates-20 "
                "(launch/evaluate.py: --protocol candidates-20)"
            )
        return self.evaluation


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    config: type
    build: Callable[[Setting], Built]
    has_backbone: bool = False
    makes_gate: bool = False  # from the user's state, for --backbone.adapter moe-lora
    ranks: bool = True  # else it is a stage, whose validation metric is its loss
    prompts: Callable[[Setting], Prompts] | None = None  # made without loading the model
    # The model without weights, of its settings, its backbone and so many items; None: no forecast of memory.
    skeleton: Callable[[Any, BackboneConfig | None, int], Skeleton] | None = None
