"""A student with a teacher: every loss and every student learns, and without the teacher nothing about it changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from data.batches import EvaluationSequences, TrainingSequences
from data.candidate_store import CandidateStore
from data.config import DataConfig
from data.negatives import UniformNegatives
from data.sources import read
from data.splits import Split, split
from data.taught_sequences import TaughtSequences
from launch.sequences import sequence_recommender
from models import losses
from models.distillation import RankingConfig, RobustConfig, ranking_loss, robust_terms
from models.dllm2rec import DLLM2Rec, DLLM2RecConfig, VectorsConfig, lists_of
from models.gru4rec import GRU4RecConfig
from models.lrurec import LRURecConfig
from models.sasrec import SASRecConfig
from models.sequence_recommender import SequenceConfig
from tests.data.test_taught_sequences import store_of

STUDENTS = [
    pytest.param(SASRecConfig(hidden_size=8, window=10, dropout=0.0), id="sasrec"),
    pytest.param(GRU4RecConfig(hidden_size=8, window=10, dropout=0.0), id="gru4rec"),
    pytest.param(LRURecConfig(hidden_size=8, window=10, dropout=0.0), id="lrurec"),
]
LOSSES = ("intended", "paper", "published", "softmax", "rd", "dcd", "listwise", "ranknet", "none")


@pytest.fixture(scope="module")
def parts() -> Split:
    config = DataConfig(source="sample", sample_users=30, sample_series=20)
    return split(read(config), config)


def distilled(parts: Split, student: SequenceConfig, config: DLLM2RecConfig) -> DLLM2Rec:
    torch.manual_seed(0)
    vectors = torch.randn(parts.num_items + 1, 5) if config.vectors.source != "none" else None
    counts = torch.from_numpy(parts.item_counts()[1:])
    return DLLM2Rec(config, sequence_recommender(student, parts.num_items), counts, vectors)


def examples(parts: Split, rows: slice = slice(None)) -> TaughtSequences:
    store = store_of(parts)
    lists, negatives = CandidateStore(store.items[rows], store.scores[rows]), UniformNegatives(parts, 1, seed=0)
    return TaughtSequences(parts, 10, "all", None, np.arange(len(store.items))[rows], lists, negatives)


VECTORS = VectorsConfig(source="teacher")


@pytest.mark.parametrize("loss", LOSSES[:-1])
def test_every_loss_teaches_the_lists(parts: Split, loss: str) -> None:
    ranking = RankingConfig(loss=loss)  # type: ignore[arg-type]
    config = DLLM2RecConfig(ranking=ranking, vectors=VECTORS)
    model = distilled(parts, SASRecConfig(hidden_size=16, window=10, dropout=0.0), config)
    batch = examples(parts).collate(np.arange(60), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    taught = []
    for step in range(25):
        out = model(batch)
        assert out.count == batch.count
        torch.testing.assert_close(out.total.detach(), out.parts["student"] + out.parts["teacher"])
        optimizer.zero_grad()
        (out.total / out.count).backward()
        if step == 0:
            assert not {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        optimizer.step()
        taught.append(float(out.parts["teacher"]))
    assert taught[-1] < taught[0]


@pytest.mark.parametrize("rows", [slice(None), slice(None, None, 3), slice(0, 0)], ids=["all", "a third", "none"])
@pytest.mark.parametrize("robust", [0.3, 0.0])
@pytest.mark.parametrize("loss", ["intended", "softmax", "none"])
def test_what_is_added_to_the_students_own_loss(
    parts: Split, loss: str, robust: float, rows: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of scores, one of which ends amid the labels that have lists."""
    monkeypatch.setattr(losses.in_chunks, "__defaults__", (7,))  # rows
    monkeypatch.setattr(losses.soft_cross_entropy, "__defaults__", (None, 7))
    student = SASRecConfig(hidden_size=8, window=10, dropout=0.0, initializer_range=0.5)
    ranking, dros = RankingConfig(loss=loss, weight=0.6), RobustConfig(robust, 0.7)  # type: ignore[arg-type]
    model = distilled(parts, student, DLLM2RecConfig(ranking=ranking, robust=dros))
    batch = examples(parts, rows).collate(np.arange(8), 0)
    assert batch.labelled is not None
    assert batch.targets is not None
    scores = model.student.states(batch).flatten(0, 1)[batch.labelled] @ model.student.item_table[1:].T
    added = robust * robust_terms(scores, model.propensity_N, 0.7, batch.targets[:, None] - 1).sum()
    if loss != "none":
        lists = lists_of(batch)
        assert torch.equal(lists.items_TK + 1, batch.candidates)
        assert batch.candidates is not None
        added = added + 0.6 * ranking_loss(scores[: len(batch.candidates)], lists, ranking, dros, model.propensity_N)
    ours, expected = model(batch), model.student(batch).total + added
    torch.testing.assert_close(ours.total, expected)
    if ours.parts:
        torch.testing.assert_close(ours.parts["student"] + ours.parts["teacher"], expected.detach())
        torch.testing.assert_close(ours.parts["teacher"], added.detach())
    weights = [*model.parameters()]
    for one, other in zip(*(torch.autograd.grad(total, weights) for total in (ours.total, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "input only"])
@pytest.mark.parametrize("student", STUDENTS)
def test_a_plain_student_with_the_folded_table_scores_the_same(
    parts: Split, student: SequenceConfig, tied: bool
) -> None:
    student = replace(student, tied=tied, initializer_range=0.3)
    model = distilled(parts, student, DLLM2RecConfig(vectors=VECTORS)).eval()
    plain = sequence_recommender(student, parts.num_items).eval()
    weights = model.plain_weights({name: p.detach() for name, p in model.named_parameters()})
    assert weights.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights)
    batch = EvaluationSequences(parts, "test", 10).collate(np.arange(20))
    torch.testing.assert_close(plain(batch), model(batch))
    # The vectors matter, and only a tied student is matched with them.
    offsets = model.student.item_embedding.parametrizations["weight"].original  # type: ignore[index]
    assert not torch.allclose(weights["item_embedding.weight"], offsets)
    assert torch.equal(model.student.output_table, model.student.item_table) == tied


@pytest.mark.parametrize("student", STUDENTS)
def test_without_a_teacher_the_loss_is_the_students_own(parts: Split, student: SequenceConfig) -> None:
    model = distilled(parts, student, DLLM2RecConfig(ranking=RankingConfig(loss="none")))
    batch = TrainingSequences(parts, 10).collate(np.arange(8), 0)
    torch.testing.assert_close(model(batch).total, model.student(batch).total, rtol=0, atol=0)


def test_the_catalogue_is_projected_once_a_pass(parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    model = distilled(parts, SASRecConfig(hidden_size=8, window=10), DLLM2RecConfig(vectors=VECTORS))
    added = model.student.item_embedding.parametrizations["weight"][0]  # type: ignore[index]
    passes: list[int] = []
    added.register_forward_hook(lambda *_: passes.append(1))
    model(examples(parts).collate(np.arange(4), 0))
    assert len(passes) == 1
    assert not parametrize._cache


def test_a_list_holds_something() -> None:
    with pytest.raises(ValueError, match=r"--method\.teacher_k 0"):
        DLLM2RecConfig(teacher_k=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_muted_batch_teaches_nothing(parts: Split, loss: str) -> None:
    config = DLLM2RecConfig(ranking=RankingConfig(loss=loss), vectors=VECTORS)  # type: ignore[arg-type]
    model = distilled(parts, SASRecConfig(hidden_size=8, window=10), config)
    out = model(examples(parts).collate(np.arange(4), 0).muted())
    assert out.count == 0
    out.total.backward()
    # Every parameter takes part, or DistributedDataParallel would wait for its gradient.
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
