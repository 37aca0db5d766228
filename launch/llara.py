"""LLaRA and iLoRA, built from a catalogue, a backbone and an ID recommender."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.batches import Examples
from data.candidate_batches import EvaluationCandidates, TrainingCandidates
from data.candidate_prompts import texts_of_domain
from data.candidate_tokens import CandidateEncoder
from data.prompts import title_texts
from data.splits import Phase, Split
from models.backbone import load_backbone, load_tokenizer
from models.llara import ILoRA, ILoRAConfig, LLaRA, LLaRAConfig
from models.pretrained import load_saved_tokenizer
from models.sasrec_llara import SASRecLLaRA, read_sasrec_llara
from models.sequence_recommender import SequenceRecommender
from models.tiny import LONG_PROMPTS, vocabulary_text

from .earlier_runs import require_run
from .setting import Built, Setting


def build_llara(setting: Setting) -> Built:
    config: LLaRAConfig = setting.method
    assert setting.backbone is not None
    prompts = config.prompts
    sasrec = inner_sasrec(setting, config.sasrec, "history_length", prompts.history_length)
    tokenizer = tokenizer_of(setting, config)
    encoder = CandidateEncoder.build(tokenizer, setting.catalog, prompts)
    backbone = load_backbone(setting.backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True)
    kind = ILoRA if isinstance(config, ILoRAConfig) else LLaRA
    model = kind(config, backbone, encoder.responses, sasrec)  # type: ignore[arg-type]

    def offering(split: Split, phase: Phase, candidates: np.ndarray) -> Examples:
        return EvaluationCandidates(split, phase, encoder, prompts, setting.seed, candidates)

    return Built(
        model,
        lambda: TrainingCandidates(setting.split, encoder, prompts, setting.seed),
        None,
        tokenizer,
        offering=offering,
        titles=encoder.item_titles,
    )


def tokenizer_of(setting: Setting, config: LLaRAConfig) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer; that of tiny learns the titles and the texts around them."""
    assert setting.backbone is not None
    if setting.saved is not None:
        return load_saved_tokenizer(str(setting.saved / "tokenizer"))
    titles, domain = title_texts(setting.catalog), texts_of_domain(config.prompts.domain)
    shown = titles[1:3]
    texts = [domain.prompt(text, shown, shown, config.prompts.mode) for text in range(len(domain.texts))]
    learned = vocabulary_text(titles, setting.split.item_counts(), texts, LONG_PROMPTS)
    return load_tokenizer(setting.backbone, learned)


def inner_sasrec(setting: Setting, path: Path | None, flag: str, shown: int) -> SequenceRecommender | None:
    """The ID recommender that --method.sasrec names; raises ValueError where it is not one.

    Or where it reads fewer events than the `shown` of a prompt, which --method.prompts.<flag> sets.
    """
    if path is None:
        return None
    sasrec: object
    if path.suffix == ".safetensors":
        sasrec = shipped_sasrec(path, setting)
    else:
        require_run(path, "sasrec", setting)
        sasrec = setting.load_model(path).model
    if not isinstance(sasrec, SequenceRecommender):
        raise ValueError(f"--method.sasrec {path} is a run of another model: expected one of sasrec, gru4rec or lrurec")
    window = sasrec.config.window
    if window < shown:
        raise ValueError(
            f"--method.sasrec {path} reads {window} events, and prompts show {shown}: pass --method.prompts.{flag} "
            f"{window}"
        )
    return sasrec


def shipped_sasrec(path: Path, setting: Setting) -> SASRecLLaRA:
    """An encoder that LLaRA ships; raises ValueError where its items cannot be matched with the catalogue's."""
    if not path.is_file():
        raise ValueError(f"--method.sasrec {path}: there is no such file")
    raw_ids = setting.catalog.raw_ids[1:]
    if not all(raw_id.isdecimal() for raw_id in raw_ids):
        raise ValueError(f"--method.sasrec {path} numbers its items, and this catalogue has other ids: name a run")
    return read_sasrec_llara(path, np.array(raw_ids, dtype=np.int64))
