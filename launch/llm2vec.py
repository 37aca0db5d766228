"""The stages of LLM2Vec as the table of methods builds them: they prepare a backbone for dense retrieval."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.batches import Examples
from data.corpus import Corpus, CorpusSettings
from data.prompts import title_texts
from data.retrieval_texts import RetrievalTexts
from data.stage_examples import MaskedTexts, WholeTexts, mask_token_id
from models.backbone import BackboneConfig, load_backbone, load_tokenizer
from models.mntp import MNTP, MNTPConfig
from models.pretrained import load_saved_tokenizer
from models.simcse import PUBLISHED_DROPOUT, SimCSE, SimCSEConfig
from models.text_encoder import TextEncoder
from models.tiny import vocabulary_text

from .setting import Built, Setting


def build_mntp(setting: Setting) -> Built:
    config: MNTPConfig = setting.method
    assert setting.backbone is not None
    backbone, tokenizer = both_ways(setting.backbone), tokenizer_of(setting)
    mask_token_id(tokenizer, config.masking.token)  # fails now or never
    model = load_backbone(backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True, masked=True)

    def examples(corpus: Corpus, texts: np.ndarray) -> Examples:
        return MaskedTexts(corpus, texts, config.masking, tokenizer, setting.seed)

    return as_stage(MNTP(model), setting, tokenizer, examples)


def build_simcse(setting: Setting) -> Built:
    config: SimCSEConfig = setting.method
    assert setting.backbone is not None
    backbone, tokenizer = with_dropout(setting.backbone), tokenizer_of(setting)
    model = load_backbone(backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True, head=False)

    def examples(corpus: Corpus, texts: np.ndarray) -> Examples:
        return WholeTexts(corpus, texts, config.texts.pool_prefix)

    return as_stage(SimCSE(config, TextEncoder(model, config.pooling)), setting, tokenizer, examples)


def both_ways(backbone: BackboneConfig) -> BackboneConfig:
    """What mntp makes of a backbone's settings."""
    if backbone.causal:
        raise ValueError(
            "--backbone.causal true hides what follows a masked token, which mntp teaches a decoder to use: pass false "
            "or take the flag away"
        )
    return replace(backbone, causal=False)


def with_dropout(backbone: BackboneConfig) -> BackboneConfig:
    """What simcse makes of a backbone's settings: without dropout its two views of a text would be one."""
    return backbone if backbone.dropout is not None else replace(backbone, dropout=PUBLISHED_DROPOUT)


def as_stage(
    model: MNTP | SimCSE,
    setting: Setting,
    tokenizer: PreTrainedTokenizerFast,
    examples: Callable[[Corpus, np.ndarray], Examples],
) -> Built:
    """A stage with the texts that it trains and those that it holds out."""
    texts: CorpusSettings = setting.method.texts

    @cache
    def parts() -> tuple[Examples, Examples]:
        if texts.file is not None:
            corpus = Corpus.of_file(texts.file, tokenizer, texts.max_length)
        else:
            corpus = Corpus.of_catalog(setting.split, RetrievalTexts.build(tokenizer, setting.catalog, texts))
        trained, held_out = corpus.hold_out(texts.held_out, setting.seed)
        return examples(corpus, trained), examples(corpus, held_out)

    return Built(model, lambda: parts()[0], None, tokenizer, held_out=lambda: parts()[1])


def tokenizer_of(setting: Setting) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer, or the one that the run has saved."""
    assert setting.backbone is not None
    if setting.saved is not None:
        return load_saved_tokenizer(str(setting.saved / "tokenizer"))
    settings: CorpusSettings = setting.method.texts
    prefixes = [settings.user_prefix, settings.item_prefix]
    titles, counts = title_texts(setting.catalog), setting.split.item_counts()
    return load_tokenizer(setting.backbone, vocabulary_text(titles, counts, prefixes))
