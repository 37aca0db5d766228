"""DLLM2Rec built from a teacher's run: its lists, its item vectors, and how the student compares with it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches import EvaluationSequences, Examples, TrainingSequences
from data.candidate_store import CandidateStore
from data.negatives import UniformNegatives
from data.prompts import title_texts
from data.taught_sequences import TaughtSequences
from evaluation.metrics import per_user_metrics
from evaluation.results import Evaluation, read_ranks
from models.dllm2rec import DLLM2Rec, DLLM2RecConfig
from models.e4srec import item_vectors
from models.gru4rec import GRU4RecConfig
from models.lrurec import LRURecConfig

from .candidates import Retriever
from .item_tables import encoded_titles
from .sequences import sequence_recommender
from .setting import Built, Distilled, Setting

OVERLAP = 20  # places in which student and teacher are compared, as published


def build_dllm2rec(setting: Setting) -> Built:
    config: DLLM2RecConfig = setting.method
    if config.teacher is None:
        raise ValueError("a student needs a teacher: pass --method.teacher, the folder of a finished run")
    split, own = setting.split, config.student
    teacher = Retriever(config.teacher, setting, "teacher")
    ranks = read_ranks(teacher.run.folder / "ranks" / "valid.parquet")
    if ranks.header["protocol"] != "full":
        raise ValueError(
            f"--method.teacher {config.teacher} ranked {ranks.header['protocol']}: expected a run that ranks the whole "
            "catalogue (--evaluation.protocol full)"
        )
    with torch.random.fork_rng(devices=[]):  # else the student's first weights would tell what was in the cache
        lists_at_valid, vectors = teacher.candidates(split, "valid", OVERLAP), added_vectors(setting, config, teacher)
    counts = torch.from_numpy(split.item_counts()[1:])
    student = sequence_recommender(own, setting.catalog.num_items)
    model = DLLM2Rec(config, student, counts, vectors)

    def training() -> Examples:
        negatives = None
        if own.loss != "cross-entropy":
            negatives = UniformNegatives(split, own.num_negatives, setting.seed)
        if config.ranking.loss == "none":
            return TrainingSequences(split, own.window, own.windows, negatives)
        store = teacher.candidates(split, "train", config.teacher_k).require_full("--method.teacher_k")
        label_negatives = UniformNegatives(split, 1, setting.seed) if config.ranking.samples else None
        return TaughtSequences(split, own.window, own.windows, negatives, store, label_negatives)

    def compared(student: Evaluation) -> dict[str, Any]:
        return compare(ranks.ranks.greater, ranks.ranks.equal, lists_at_valid, student)

    return Built(
        model,
        training,
        lambda split, phase: EvaluationSequences(split, phase, own.window),
        distilled=Distilled(student_name(config), own, model.plain_weights, compared, OVERLAP),
    )


def student_name(config: DLLM2RecConfig) -> str:
    """The name in launch/methods.py of the method that the student alone is of."""
    if isinstance(config.student, GRU4RecConfig):
        return "gru4rec"
    return "lrurec" if isinstance(config.student, LRURecConfig) else "sasrec"


def added_vectors(setting: Setting, config: DLLM2RecConfig, teacher: Retriever) -> Tensor | None:
    """Return the vectors [N + 1, D] that the student's items get, scaled to entries of mean square 1; row 0 is zero."""
    if config.vectors.source == "none":
        return None
    if config.vectors.source == "encoder":
        vectors = encoded_titles(config.vectors.encoder, title_texts(setting.catalog)[1:])
    else:
        try:
            vectors = item_vectors(teacher.load().model)
        except ValueError as error:
            raise ValueError(
                f"--method.vectors.source teacher: {config.teacher} is a run without item vectors: pass encoder or none"
            ) from error
    vectors = vectors.detach().float().cpu()
    vectors[0] = 0
    return vectors / vectors[1:].square().mean().sqrt()


def compare(greater: np.ndarray, equal: np.ndarray, lists: CandidateStore, student: Evaluation) -> dict[str, Any]:
    """What teacher and student have in common and who is better, over the rows of an evaluation.

    `greater` and `equal` [n] count the items that the teacher scores above, and like, the target; `lists` are its best.
    """
    rank, own_rank = greater + equal / 2, student.ranks.greater + student.ranks.equal / 2
    own = student.recommendations[:, : lists.k]
    shared = (lists.items[:, :, None] == own[:, None, :]).any(2) & (lists.items > 0)
    return {
        "NDCG@10": {
            "teacher": float(per_user_metrics(greater, equal, (10,))["NDCG@10"].mean()),
            "student": student.metrics["NDCG@10"],
        },
        f"overlap@{lists.k}": float(shared.mean()),
        "teacher_better": float((rank < own_rank).mean()),
        "student_better": float((rank > own_rank).mean()),
    }
