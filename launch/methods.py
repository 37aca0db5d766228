"""The one table of methods: name -> its settings and how to build its model and examples."""

import numpy as np
import torch

from data.batches import (
    EvaluationPrompts,
    Examples,
    TrainingPrompts,
)
from data.item_examples import EvaluationItemPrompts, TrainingItemPrompts
from data.item_prompts import ItemPromptLayout
from data.negatives import SharedNegatives
from data.prompts import template_by_name, title_texts
from data.splits import Phase, Split
from data.title_tokens import TitleTokens
from data.tokenized import Prompts, shared_start
from models.backbone import is_causal, load_backbone, load_tokenizer
from models.bigrec import BIGRec, BIGRecConfig
from models.dense_retrieval_config import DenseRetrievalConfig
from models.dllm2rec import DLLM2RecGRU4RecConfig, DLLM2RecLRURecConfig, DLLM2RecSASRecConfig
from models.e4srec import E4SRec, E4SRecConfig
from models.ensemble import EnsembleConfig
from models.gru4rec import GRU4RecConfig
from models.ilora_items import ILoRAItems, ILoRAItemsConfig
from models.llamarec import LlamaRecConfig
from models.llara import ILoRAConfig, LLaRAConfig
from models.lrurec import LRURecConfig
from models.mntp import MNTPConfig
from models.moe_lora import find_gate
from models.pretrained import load_saved_tokenizer
from models.rankllm import RankLLMConfig
from models.sasrec import SASRecConfig
from models.simcse import SimCSEConfig
from models.tiny import vocabulary_text
from models.title_grounding import TitleGrounding
from models.ur4rec.reranking import UR4RecConfig, UR4RecPretrainConfig
from models.ur4rec.v2_config import UR4RecV2Config

from .dense_retrieval import build_dense_retrieval
from .distillation import build_dllm2rec
from .item_tables import item_tables
from .llamarec import build_llamarec
from .llara import build_llara, inner_sasrec
from .llm2vec import build_mntp, build_simcse
from .members import build_ensemble
from .rankllm import build_rankllm
from .sequences import build_sequence_recommender
from .setting import Built, EveryPosition, Method, Setting
from .skeletons import item_ids, item_lists, item_vectors, texts, ur4rec_v2, writers
from .skeletons.base import next_token
from .ur4rec_lists import build_ur4rec, build_ur4rec_pretrain
from .ur4rec_v2 import build_ur4rec_v2


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

    # Gradient checkpointing keeps no keys and values, by which rows would share a start.
    may_share = config.prompts.mode == "response" and not setting.backbone.gradient_checkpointing

    def training() -> Examples:
        rows = prompts.rows(split, "train")
        return TrainingPrompts(
            rows,
            split,
            titles,
            label_inputs=config.loss_on_inputs,
            label_items=config.objective == "items",
            shared=shared_start(rows) if may_share and not config.loss_on_inputs else 0,
        )

    def evaluation(split: Split, phase: Phase) -> Examples:
        histories = other.evaluation_among(split, phase, None) if other is not None else None
        return EvaluationPrompts(prompts.rows(split, phase), histories)

    model = BIGRec(config, backbone, titles, grounding)
    return Built(
        model,
        training,
        evaluation,
        tokenizer,
        model.choose_gamma if model.chooses_gamma else None,
    )


def build_item_reader(setting: Setting) -> Built:
    """E4SRec, or iLoRA's items: the same prompts around other vectors."""
    config: E4SRecConfig | ILoRAItemsConfig = setting.method
    assert setting.backbone is not None
    split, catalog, prompts = setting.split, setting.catalog, config.prompts
    sasrec = None
    if isinstance(config, ILoRAItemsConfig):
        sasrec = inner_sasrec(setting, config.sasrec, "max_history", prompts.max_history)
        if sasrec is None:
            raise ValueError(
                "ilora-items reads the states of an ID recommender: pass --method.sasrec, a run of sasrec, gru4rec or "
                "lrurec"
            )
    texts = title_texts(catalog)
    if setting.saved is not None:
        tokenizer = load_saved_tokenizer(str(setting.saved / "tokenizer"))
    else:
        pieces = [prompts.instruction, prompts.response]
        tokenizer = load_tokenizer(setting.backbone, vocabulary_text(texts, split.item_counts(), pieces))
    backbone = load_backbone(setting.backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True, head=False)
    layout = ItemPromptLayout.build(
        tokenizer,
        catalog,
        prompts,
        causal=is_causal(backbone),
        shares_prefix=not setting.backbone.gradient_checkpointing,  # which keeps no keys and values
        gated=find_gate(backbone) is not None,
        with_history=sasrec is not None,
    )
    model: E4SRec | ILoRAItems
    if isinstance(config, ILoRAItemsConfig):
        assert sasrec is not None
        model = ILoRAItems(config, backbone, sasrec)
    else:
        model = E4SRec(config, backbone, *item_tables(setting, config, backbone, tokenizer))

    def training() -> Examples:
        negatives = None
        if config.loss == "sampled-cross-entropy":
            negatives = SharedNegatives(split, config.num_negatives, config.negatives_alpha, setting.seed)
        return TrainingItemPrompts(split, layout, prompts, negatives)

    def windows(split: Split, spans: np.ndarray) -> Examples:
        return TrainingItemPrompts(split, layout, prompts, spans=spans)

    return Built(
        model,
        training,
        lambda split, phase: EvaluationItemPrompts(split, phase, layout, prompts.max_history),
        tokenizer,
        every_position=EveryPosition(prompts.max_history, windows) if layout.trains_every_position else None,
    )


METHODS = {
    "bigrec": Method(BIGRecConfig, build_bigrec, has_backbone=True, prompts=bigrec_prompts, skeleton=writers.bigrec),
    "dense-retrieval": Method(
        DenseRetrievalConfig, build_dense_retrieval, has_backbone=True, skeleton=texts.dense_retrieval
    ),
    "dllm2rec-gru4rec": Method(DLLM2RecGRU4RecConfig, build_dllm2rec, skeleton=item_ids.student),
    "dllm2rec-lrurec": Method(DLLM2RecLRURecConfig, build_dllm2rec, skeleton=item_ids.student),
    "dllm2rec-sasrec": Method(DLLM2RecSASRecConfig, build_dllm2rec, skeleton=item_ids.student),
    "e4srec": Method(E4SRecConfig, build_item_reader, has_backbone=True, skeleton=item_vectors.e4srec),
    "ensemble": Method(EnsembleConfig, build_ensemble),
    "gru4rec": Method(GRU4RecConfig, build_sequence_recommender, skeleton=item_ids.sequences),
    "ilora": Method(ILoRAConfig, build_llara, has_backbone=True, makes_gate=True, skeleton=item_vectors.llara),
    "ilora-items": Method(ILoRAItemsConfig, build_item_reader, has_backbone=True, makes_gate=True, skeleton=next_token),
    "llamarec": Method(LlamaRecConfig, build_llamarec, has_backbone=True, skeleton=writers.llamarec),
    "llara": Method(LLaRAConfig, build_llara, has_backbone=True, skeleton=item_vectors.llara),
    "lrurec": Method(LRURecConfig, build_sequence_recommender, skeleton=item_ids.sequences),
    "mntp": Method(MNTPConfig, build_mntp, has_backbone=True, ranks=False, skeleton=texts.mntp),
    "rankllm": Method(RankLLMConfig, build_rankllm, has_backbone=True, skeleton=writers.rankllm),
    "sasrec": Method(SASRecConfig, build_sequence_recommender, skeleton=item_ids.sequences),
    "simcse": Method(SimCSEConfig, build_simcse, has_backbone=True, ranks=False, skeleton=texts.simcse),
    "ur4rec": Method(UR4RecConfig, build_ur4rec, skeleton=item_lists.ur4rec),
    "ur4rec-pretrain": Method(UR4RecPretrainConfig, build_ur4rec_pretrain, ranks=False, skeleton=item_lists.ur4rec),
    "ur4rec-v2": Method(UR4RecV2Config, build_ur4rec_v2, skeleton=ur4rec_v2.ur4rec_v2),
}
