"""LlamaRec, built from a backbone and the candidates of an earlier run."""

import hashlib
import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data.batches import Examples
from data.candidate_rows import shuffled
from data.candidate_store import CandidateStore
from data.draws import Draws
from data.identifiers import LETTERS, Identifiers, NotOneToken, encoded_alone, resolve
from data.prompts import title_texts
from data.ranking_batches import EvaluationRankings, TrainingRankings
from data.ranking_prompts import RankingSettings, cleaned_movie_title, ranking_prompt, shown_titles
from data.ranking_tokens import RankingEncoder
from data.splits import Phase, Split
from data.title_tokens import TokenTable, encode
from evaluation.results import Evaluation
from models.backbone import Backbone, load_backbone, load_tokenizer
from models.item_embeddings import mean_token_embeddings
from models.llamarec import LlamaRec, LlamaRecConfig
from models.pretrained import load_saved_tokenizer
from models.sequence_recommender import SequenceRecommender
from models.tiny import LONG_PROMPTS, vocabulary_text

from .candidates import FirstStage, Retriever
from .setting import Built, CannotRank, Reranking, Setting

logger = logging.getLogger("shardrec")

COUNT_FLAG = "--method.prompts.num_candidates"


def build_llamarec(setting: Setting) -> Built:
    config: LlamaRecConfig = setting.method
    assert setting.backbone is not None
    if config.retriever is None:
        raise ValueError("llamarec ranks the candidates of another run: pass --method.retriever, its folder")
    prompts, split = config.prompts, setting.split
    stage = FirstStage(Retriever(config.retriever, setting), prompts.num_candidates, COUNT_FLAG, split)
    if setting.saved is None:
        stage.report_ceiling()
    tokenizer = tokenizer_of(setting, config)
    if config.objective == "published" and tokenizer.eos_token_id is None:
        raise ValueError("--method.objective published ends answers with EOS, which this tokenizer has not")
    titles = shown_titles(tokenizer, setting.catalog, prompts)
    identifiers = None if config.scoring == "dot" else choose_identifiers(tokenizer, config)
    encoder = RankingEncoder(tokenizer, titles, prompts.history_length, identifiers)
    has_head = config.scoring == "identifiers"
    backbone = load_backbone(
        setting.backbone, tokenizer, seed=setting.seed, device="cpu", trainable=True, head=has_head
    )
    table = item_table(config, backbone, tokenizer, titles, stage) if config.scoring == "dot" else None
    letters = None if identifiers is None else identifiers.token_ids
    alone = encoded_alone(tokenizer, identifiers.labels) if identifiers and config.verbalizer == "published" else None
    model = LlamaRec(config, backbone, setting.catalog.num_items, letters, alone, tokenizer.eos_token_id, table)
    evaluated = partial(EvaluationRankings, encoder=encoder, settings=prompts, seed=setting.seed)

    def training() -> Examples:
        hard = stage.candidates(split, "train") if config.negatives == "hard" else None
        answers = letters if config.objective == "published" else None
        return TrainingRankings(split, encoder, prompts, setting.seed, cuts=config.cuts, hard=hard, answer_ids=answers)

    def listing(split: Split, phase: Phase, store: CandidateStore) -> Examples:
        return evaluated(split, phase, store=store, permutations=config.permutations)

    def evaluation(split: Split, phase: Phase) -> Examples:
        return listing(split, phase, stage.candidates(split, phase))

    def offering(split: Split, phase: Phase, candidates: np.ndarray) -> Examples:
        if identifiers is not None and candidates.shape[1] > len(identifiers):
            raise CannotRank(
                f"its prompts have {len(identifiers)} identifiers, and this protocol offers {candidates.shape[1]} "
                f"candidates: train with {COUNT_FLAG} {candidates.shape[1]}, or pass --protocol full"
            )
        draws = Draws.of(setting.seed, 0, np.arange(len(candidates)))
        shown = shuffled(candidates, draws).astype(np.int32)  # the target comes first
        return evaluated(split, phase, store=CandidateStore(shown, np.zeros(shown.shape, np.float32)), scored=False)

    def summary(split: Split, evaluation: Evaluation) -> dict[str, Any]:
        return {"llm_weight": float(model.llm_weight), **stage.figures(split, evaluation)}

    fits = config.llm_weight is None
    return Built(
        model,
        training,
        evaluation,
        tokenizer,
        model.choose_weight if fits else None,
        offering=offering,
        summary=summary,
        reranking=Reranking(stage.candidates, listing, digest_of(prompts, titles, identifiers)),
    )


def digest_of(prompts: RankingSettings, titles: list[str], identifiers: Identifiers | None) -> str:
    """A hash of all that prompts are made of, beside histories and candidates."""
    offered = None if identifiers is None else list(zip(identifiers.labels, titles[1:], strict=False))
    parts = (ranking_prompt(titles[1:3], offered), asdict(prompts), titles)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def tokenizer_of(setting: Setting, config: LlamaRecConfig) -> PreTrainedTokenizerFast:
    """The backbone's tokenizer; that of tiny learns the titles and the text around them."""
    assert setting.backbone is not None
    if setting.saved is not None:
        return load_saved_tokenizer(str(setting.saved / "tokenizer"))
    titles = title_texts(setting.catalog)
    shown = ["", *map(cleaned_movie_title, titles[1:])] if config.prompts.titles == "published-movie" else titles
    history = shown[1 : 1 + config.prompts.history_length]
    offered = list(zip(LETTERS, shown[1 : 1 + config.prompts.num_candidates], strict=False))
    example = ranking_prompt(history, None if config.scoring == "dot" else offered)
    learned = vocabulary_text(shown, setting.split.item_counts(), [example], LONG_PROMPTS)
    return load_tokenizer(setting.backbone, learned)


def choose_identifiers(tokenizer: PreTrainedTokenizerFast, config: LlamaRecConfig) -> Identifiers:
    """Letters where each is one token behind a prompt, else vectors; raises ValueError where letters are required."""
    count = config.prompts.num_candidates
    required = config.identifiers == "letters" or config.objective == "published"
    if config.identifiers != "vectors":
        try:
            if count > len(LETTERS):
                raise NotOneToken(f"there are {len(LETTERS)} letters, and {COUNT_FLAG} is {count}")
            labels = LETTERS[:count]
            return Identifiers(labels, resolve(tokenizer, ranking_prompt(["a"], [("A", "b")]), labels))
        except NotOneToken as error:
            if required:
                raise ValueError(
                    f"{error}: pass --method.identifiers vectors with --method.objective candidates"
                ) from error
            logger.info("%s: candidates are named by learned vectors", error)
    if required or config.prompts.truncation == "left":
        raise ValueError(
            "--method.identifiers vectors have no tokens: they go with --method.objective candidates and "
            "--method.prompts.truncation history"
        )
    return Identifiers(tuple(map(str, range(1, count + 1))), None)


def item_table(
    config: LlamaRecConfig, backbone: Backbone, tokenizer: PreTrainedTokenizerFast, titles: list[str], stage: FirstStage
) -> Tensor:
    """The vectors of scoring dot, [N + 1, D]."""
    if config.item_vectors == "titles":
        return mean_token_embeddings(backbone, TokenTable.of([[], *encode(tokenizer, titles[1:])]))
    retriever = stage.retriever.setting.load_model(stage.retriever.run.folder).model
    if not isinstance(retriever, SequenceRecommender):
        raise ValueError(
            f"--method.item_vectors retriever: {stage.retriever.run.folder} has no item table; pass titles, or a "
            "--method.retriever of sasrec, gru4rec or lrurec"
        )
    return retriever.item_table.detach().cpu()
