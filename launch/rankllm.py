"""RankLLM, built from a retriever's candidates, a catalogue and a backbone."""

from collections import Counter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.batches import Examples
from data.candidate_rows import shuffled
from data.candidate_store import CandidateStore
from data.draws import Draws
from data.listwise_batches import ListedHistories, TrainingLists
from data.listwise_prompts import ListwiseEncoder
from data.listwise_templates import ONE_CANDIDATE, ONE_HISTORY, ONE_QUESTION, rank_template
from data.permutations import STATUSES
from data.prompts import title_texts
from data.splits import Phase, Split
from data.teacher_labels import TeacherLabels
from models.backbone import load_backbone, load_tokenizer
from models.devices import gather_object
from models.pretrained import load_saved_tokenizer
from models.rankllm import RankLLM, RankLLMConfig
from models.tiny import LONG_PROMPTS, vocabulary_text

from .candidates import FirstStage, Retriever
from .setting import Built, Reranking, Setting


def build_rankllm(setting: Setting) -> Built:
    config: RankLLMConfig = setting.method
    assert setting.backbone is not None
    if config.retriever is None:
        raise ValueError("rankllm ranks what another model retrieves: pass --method.retriever, the run folder of one")
    flag = "--method.num_candidates"
    stage = FirstStage(Retriever(config.retriever, setting), config.num_candidates, flag, setting.split)
    if setting.saved is None:
        stage.report_ceiling()
    tokenizer = tokenizer_of(setting, config)
    encoder = ListwiseEncoder.build(tokenizer, setting.catalog, config.prompts)
    backbone = load_backbone(setting.backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True)
    model = RankLLM(config, backbone, encoder, setting.seed)

    def training() -> Examples:
        if config.objective != "generation":
            encoder.single_names(config.shown)  # fails now or never
        store = labels = None
        if config.labels is not None:
            labels = TeacherLabels.read(config.labels, setting.split, setting.catalog)
        else:
            store = stage.retriever.candidates(setting.split, "train", config.shown)
        writes = config.objective in ("generation", "combined")
        return TrainingLists(setting.split, encoder, store, labels, config.shown, setting.seed, writes=writes)

    def listing(split: Split, phase: Phase, store: CandidateStore) -> Examples:
        return ListedHistories(split, phase, encoder, store.items, config.window)

    def evaluation(split: Split, phase: Phase) -> Examples:
        return listing(split, phase, stage.candidates(split, phase))

    def offering(split: Split, phase: Phase, candidates: np.ndarray) -> Examples:
        listed = shuffled(candidates, Draws.of(setting.seed, 0, np.arange(len(candidates))))  # the target comes first
        return ListedHistories(split, phase, encoder, listed, config.window)

    def figures() -> dict[str, Any]:
        counts: Counter[str] = sum(gather_object([model.take_counts()]), Counter())
        users = max(counts["users"], 1)
        per_user = {f"{name}_per_user": counts[name] / users for name in ("windows", "calls")}
        return per_user | {"answers": {status: counts[status] for status in STATUSES if counts[status]}}

    return Built(
        model,
        training,
        evaluation,
        tokenizer,
        offering=offering,
        summary=stage.figures,
        reranking=Reranking(stage.candidates, listing, encoder.digest),
        scoring_figures=figures,
    )


def tokenizer_of(setting: Setting, config: RankLLMConfig) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer; that of tiny learns the titles and the texts around them."""
    assert setting.backbone is not None
    if setting.saved is not None:
        return load_saved_tokenizer(str(setting.saved / "tokenizer"))
    titles, template = title_texts(setting.catalog), rank_template(config.prompts.template)
    prompt = template.messages(template.joiner.join(titles[1:3]), titles[1 : 1 + config.shown])
    texts = ["\n".join(prompt), ONE_HISTORY, ONE_CANDIDATE, ONE_QUESTION]
    learned = vocabulary_text(titles, setting.split.item_counts(), texts, LONG_PROMPTS)
    return load_tokenizer(setting.backbone, learned)
