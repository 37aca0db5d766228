"""DLLM2Rec built from a teacher's run: its lists, its item vectors, and how the student compares with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.batches import EvaluationSequences, Examples, TrainingSequences
from data.candidate_store import CandidateStore
from data.negatives import UniformNegatives
from data.prompts import title_texts
from data.taught_sequences import TaughtSequences
from data.teacher_lists import MANIFEST, TeacherFolder
from evaluation.metrics import per_user_metrics
from evaluation.results import Evaluation, read_ranks
from models.dllm2rec import DLLM2Rec, DLLM2RecConfig
from models.gru4rec import GRU4RecConfig
from models.lrurec import LRURecConfig

from .candidates import Retriever
from .item_tables import encoded_titles
from .sequences import sequence_recommender
from .setting import Built, Distilled, Setting

OVERLAP = 20  # places in which student and teacher are compared, as published


class Teacher(Protocol):
    """Who names items and may know them by vectors."""

    def lists(self, k: int) -> tuple[np.ndarray, CandidateStore]:
        """Return the rows of `training_cuts` that have a list, [n], and the best k of each. Collective."""

    def vectors(self) -> Tensor | None:
        """Return item vectors [N + 1, D], where there are some."""

    @property
    def compare(self) -> Callable[[Evaluation], dict[str, Any]] | None:
        """Compare a student's validation with the teacher's, where that is known."""


class TeachingRun:
    """A finished run, asked for what it has not said yet."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.split = path, setting.split
        self.retriever = Retriever(path, setting, "teacher")
        self.ranks = read_ranks(self.retriever.run.folder / "ranks" / "valid.parquet")
        if self.ranks.header["protocol"] != "full":
            raise ValueError(
                f"--method.teacher {path} ranked {self.ranks.header['protocol']}: expected a run that ranks the whole "
                "catalogue (--evaluation.protocol full)"
            )
        with torch.random.fork_rng(devices=[]):  # else the student's first weights would tell what was in the cache
            self.at_valid = self.retriever.candidates(self.split, "valid", OVERLAP)

    def lists(self, k: int) -> tuple[np.ndarray, CandidateStore]:
        store = self.retriever.candidates(self.split, "train", k).require_full("--method.teacher_k")
        return np.arange(len(store.items)), store

    def vectors(self) -> Tensor | None:
        with torch.random.fork_rng(devices=[]):
            return self.retriever.load().model.catalogue_vectors()

    def compare(self, student: Evaluation) -> dict[str, Any]:
        return compare(self.ranks.ranks.greater, self.ranks.ranks.equal, self.at_valid, student)


@dataclass(frozen=True)
class WrittenTeacher:
    """What launch/label.py has written of a run, which may be gone. It says nothing of validation."""

    folder: TeacherFolder
    compare: None = None

    def lists(self, k: int) -> tuple[np.ndarray, CandidateStore]:
        return self.folder.read(k)

    def vectors(self) -> Tensor | None:
        return self.folder.vectors()


def teacher_of(config: DLLM2RecConfig, setting: Setting) -> Teacher:
    """Return the run, or what was written of one, in the folder that --method.teacher names."""
    if config.teacher is None:
        raise ValueError("a student needs a teacher: pass --method.teacher, the folder of a finished run")
    if not (config.teacher / MANIFEST).is_file():
        return TeachingRun(config.teacher, setting)
    folder = TeacherFolder(config.teacher, setting.split, setting.catalog)
    folder.require_lists(0 if config.ranking.loss == "none" else config.teacher_k)
    return WrittenTeacher(folder)


def build_dllm2rec(setting: Setting) -> Built:
    config: DLLM2RecConfig = setting.method
    split, own = setting.split, config.student
    teacher = teacher_of(config, setting)
    vectors = added_vectors(setting, config, teacher)
    counts = torch.from_numpy(split.item_counts()[1:])
    student = sequence_recommender(own, setting.catalog.num_items)
    model = DLLM2Rec(config, student, counts, vectors)

    def training() -> Examples:
        negatives = None
        if own.loss != "cross-entropy":
            negatives = UniformNegatives(split, own.num_negatives, setting.seed)
        if config.ranking.loss == "none":
            return TrainingSequences(split, own.window, own.windows, negatives)
        label_negatives = UniformNegatives(split, 1, setting.seed) if config.ranking.samples else None
        lists = teacher.lists(config.teacher_k)
        return TaughtSequences(split, own.window, own.windows, negatives, *lists, label_negatives)

    return Built(
        model,
        training,
        lambda split, phase: EvaluationSequences(split, phase, own.window),
        distilled=Distilled(student_name(config), own, model.plain_weights, teacher.compare, OVERLAP),
    )


def student_name(config: DLLM2RecConfig) -> str:
    """The name in launch/methods.py of the method that the student alone is of."""
    if isinstance(config.student, GRU4RecConfig):
        return "gru4rec"
    return "lrurec" if isinstance(config.student, LRURecConfig) else "sasrec"


def added_vectors(setting: Setting, config: DLLM2RecConfig, teacher: Teacher) -> Tensor | None:
    """Return the vectors [N + 1, D] that the student's items get, scaled to entries of mean square 1; row 0 is zero."""
    if config.vectors.source == "none":
        return None
    if config.vectors.source == "encoder":
        with torch.random.fork_rng(devices=[]):
            vectors = encoded_titles(config.vectors.encoder, title_texts(setting.catalog)[1:])
    else:
        known = teacher.vectors()
        if known is None:
            raise ValueError(
                f"--method.vectors.source teacher: {config.teacher} has no item vectors: pass encoder or none"
            )
        vectors = known
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
