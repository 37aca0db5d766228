"""The one table of methods: name -> its settings and how to build its model and examples."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.batches import (
    EvaluationPrompts,
    EvaluationSequences,
    Examples,
    TrainingPrompts,
    TrainingSequences,
)
from data.interactions import Catalog
from data.negatives import UniformNegatives
from data.prompts import template_by_name, title_texts
from data.splits import Phase, Split
from data.title_tokens import TitleTokens
from data.tokenized import Prompts
from models.backbone import BackboneConfig, load_backbone, load_saved_tokenizer, load_tokenizer
from models.base import Recommender
from models.bigrec import BIGRec, BIGRecConfig
from models.sasrec import SASRec, SASRecConfig
from models.tiny import vocabulary_text
from models.title_grounding import TitleGrounding


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
class Built:
    """A model with the examples that train and evaluate it; examples are made when they are asked for."""

    model: Recommender
    training: Callable[[], Examples]
    evaluation: Callable[[Split, Phase], Examples]
    tokenizer: PreTrainedTokenizerBase | None = None  # saved with the model
    # Chooses what is fitted on validation after training, from the prepared model, this process's batches and every
    # held-out item.
    calibrate: Callable[[nn.Module, Iterable[Any], np.ndarray], None] | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    config: type
    build: Callable[[Setting], Built]
    has_backbone: bool = False
    prompts: Callable[[Setting], Prompts] | None = None  # made without loading the model


def build_sasrec(setting: Setting) -> Built:
    config: SASRecConfig = setting.method

    def training() -> Examples:
        negatives = None
        if config.loss != "cross-entropy":
            negatives = UniformNegatives(setting.split, config.num_negatives, setting.seed)
        return TrainingSequences(setting.split, config.window, config.windows, negatives)

    return Built(
        SASRec(config, setting.catalog.num_items),
        training,
        lambda split, phase: EvaluationSequences(split, phase, config.window),
    )


def bigrec_prompts(setting: Setting) -> Prompts:
    assert setting.backbone is not None
    settings, texts = setting.method.prompts, title_texts(setting.catalog)
    if setting.saved is not None:
        tokenizer = load_saved_tokenizer(str(setting.saved / "tokenizer"))
    else:
        template = template_by_name(settings.template)
        examples = [template.prompt([]), template.prompt(texts[1:3])]
        tokenizer = load_tokenizer(setting.backbone, vocabulary_text(texts, setting.split.item_counts(), examples))
    return Prompts(setting.catalog, tokenizer, settings, setting.cache, setting.is_main)


def build_bigrec(setting: Setting) -> Built:
    config: BIGRecConfig = setting.method
    assert setting.backbone is not None
    split, catalog = setting.split, setting.catalog
    prompts = bigrec_prompts(setting)
    tokenizer, texts, counts = prompts.tokenizer, title_texts(catalog), split.item_counts()
    titles = TitleTokens.build(tokenizer, catalog, template_by_name(config.prompts.template))
    popularity = torch.from_numpy(counts)
    other = setting.load_model(config.grounding.collaborative_run) if config.grounding.collaborative_run else None
    collaborator = None if other is None else other.model
    grounding = TitleGrounding(
        config.grounding, tokenizer, texts, popularity, setting.cache, setting.backbone.name, collaborator
    )
    backbone = load_backbone(setting.backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True)

    def training() -> Examples:
        count_items = config.objective == "items"
        rows = prompts.rows(split, "train")
        return TrainingPrompts(rows, split, titles, label_inputs=config.loss_on_inputs, count_items=count_items)

    def evaluation(split: Split, phase: Phase) -> Examples:
        histories = other.evaluation(split, phase) if other is not None else None
        return EvaluationPrompts(prompts.rows(split, phase), histories)

    model = BIGRec(config, backbone, titles, grounding)
    return Built(
        model,
        training,
        evaluation,
        tokenizer,
        model.choose_gamma if model.chooses_gamma else None,
    )


METHODS = {
    "bigrec": Method(BIGRecConfig, build_bigrec, has_backbone=True, prompts=bigrec_prompts),
    "sasrec": Method(SASRecConfig, build_sasrec),
}
