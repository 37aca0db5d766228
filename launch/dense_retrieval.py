"""Dense retrieval as the table of methods builds it."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import nn

from data.batches import Examples
from data.interactions import Catalog
from data.prompts import title_texts
from data.retrieval_examples import EvaluationHistories, TrainingCuts
from data.retrieval_texts import RetrievalTexts
from models.backbone import load_backbone, load_tokenizer
from models.dense_retrieval import DenseRetrieval
from models.dense_retrieval_config import DenseRetrievalConfig
from models.devices import runs_on_cpu
from models.pretrained import load_saved_tokenizer
from models.text_encoder import TextEncoder
from models.tiny import vocabulary_text

from .setting import Built, Setting

CPU_ROWS = 8  # texts of similar length in a pass: a CPU pays for padding, and nothing for many passes


def build_dense_retrieval(setting: Setting) -> Built:
    config: DenseRetrievalConfig = setting.method
    assert setting.backbone is not None
    backbone, split, catalog = setting.backbone, setting.split, setting.catalog
    if setting.saved is not None:
        tokenizer = load_saved_tokenizer(str(setting.saved / "tokenizer"))
    else:
        prefixes = [config.texts.user_prefix, config.texts.item_prefix]
        tokenizer = load_tokenizer(backbone, vocabulary_text(title_texts(catalog), split.item_counts(), prefixes))

    def texts_of(catalog: Catalog) -> RetrievalTexts:
        return RetrievalTexts.build(tokenizer, catalog, config.texts, ends=config.pooling == "last")

    texts = texts_of(catalog)

    def encoder() -> TextEncoder:
        model = load_backbone(backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True, head=False)
        return TextEncoder(model, config.pooling)

    users = encoder()
    items = encoder() if config.two_encoders else users

    def training() -> Examples:
        rows = config.grad_cache_rows or (CPU_ROWS if runs_on_cpu() else None)
        return TrainingCuts(split, texts, config.cuts, setting.seed, rows)

    model = DenseRetrieval(config, texts, users, items, split.cold_items)

    def add_items(catalog: Catalog) -> None:
        model.add_items(texts_of(catalog))

    return Built(
        model,
        training,
        lambda split, phase: EvaluationHistories(split, phase, model.texts),
        tokenizer,
        calibrate=keep_index,
        add_items=add_items,
    )


def keep_index(model: nn.Module, batches: Iterable[Any], held_out: np.ndarray) -> None:
    """Save the catalogue's vectors with the weights; a batch is only what a forward pass begins with."""
    model.eval()
    model(next(iter(batches)), "keep_index")
