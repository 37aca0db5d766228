"""LlamaRec's verbalizer and its metrics of two stages, as the published code computes them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.candidate_store import CandidateStore
from data.splits import Split, Targets
from evaluation.evaluator import Evaluator
from evaluation.ranks import top_items
from evaluation.two_stages import two_stage_figures
from models.decoder import Decoder
from models.llamarec import LetterHead
from tests.conftest import Golden

Case = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Golden]) -> Case:
    return golden("llamarec_verbalizer")


def read_letters(logits_UV: Tensor, read: Tensor, stands: Tensor) -> Tensor:
    """The scores of a head whose logits are given: states are the logits, and its weight is the identity."""
    head = nn.Linear(logits_UV.shape[1], logits_UV.shape[1], bias=False)
    nn.init.eye_(head.weight)
    letters = LetterHead(read.numpy(), stands.numpy())
    return letters(Decoder(head, head), logits_UV, torch.empty(0))  # type: ignore[arg-type]


def test_scores_of_letters(case: Case) -> None:
    _, tensors = case
    coded, intended = tensors["letter_token_ids_as_coded"], tensors["letter_token_ids_intended"]
    torch.testing.assert_close(
        read_letters(tensors["logits"], intended, intended), tensors["scores_intended_ids"], rtol=0, atol=0
    )
    as_coded = read_letters(tensors["logits"], coded, intended)  # --method.verbalizer published
    torch.testing.assert_close(as_coded, tensors["scores_as_coded_ids"], rtol=0, atol=0)
    torch.testing.assert_close(as_coded, tensors["scores_two_token_first"], rtol=0, atol=0)


def test_two_stage_metrics(case: Case) -> None:
    meta, tensors = case
    scores, labels = tensors["retriever_scores"], tensors["labels"]
    users, k = len(labels), meta["sizes"]["candidates"]
    allowed = scores > -1e8
    items = top_items(scores, allowed, k)
    store = CandidateStore(items.int().numpy(), scores.gather(1, items).numpy())
    places = store.places(labels.numpy())
    retrieved = np.flatnonzero(places >= 0)
    assert retrieved.tolist() == tensors["retrieved_users"].tolist()
    assert store.items[retrieved].tolist() == tensors["candidates"].tolist()
    assert places[retrieved].tolist() == tensors["letter_labels"].tolist()
    assert store.recall(labels.numpy()) == pytest.approx(meta["n_retrieved"] / users)

    # Users whose target was not found are ranked too; only the others' logits are given.
    catalogue = torch.full((users, meta["sizes"]["items"] + 1), -torch.inf)
    coded = tensors["letter_token_ids_as_coded"]
    reranked = torch.randn(users, k, generator=torch.Generator().manual_seed(0))
    reranked[retrieved] = read_letters(tensors["llm_logits"], coded, coded)
    torch.testing.assert_close(reranked[retrieved], tensors["rerank_scores"], rtol=0, atol=0)
    catalogue.scatter_(1, items, reranked)
    ks = [cutoff for cutoff in meta["ks"] if cutoff <= k]
    evaluation = Evaluator(split_of(labels.numpy(), meta), "test", cutoffs=ks, mask="none").run(
        lambda batch: catalogue[batch.row], [Rows(torch.arange(users))]
    )
    figures = two_stage_figures(evaluation, places, k)
    assert figures["users_found"] == meta["n_retrieved"]
    for name, expected in meta["subset_metrics"].items():
        assert figures["subset"][name] == pytest.approx(expected, abs=1e-6)
    for cutoff in ks:
        for metric in ("Recall", "MRR", "NDCG"):
            name = f"{metric}@{cutoff}"
            assert figures["retriever"][name] == pytest.approx(meta["retriever_metrics_all"][name], abs=1e-6)
            own = meta["retriever_metrics_on_retrieved"][name]
            assert figures["retriever_subset"][name] == pytest.approx(own, abs=1e-6)
            assert meta["retriever_metrics_on_not_retrieved"][name] == 0
            if name in meta["overall"]:
                assert evaluation.metrics[name] == pytest.approx(meta["overall"][name], abs=1e-6)


class Rows:
    def __init__(self, row: Tensor) -> None:
        self.row = row


def split_of(targets: np.ndarray, meta: dict[str, Any]) -> Split:
    """Users whose only event is their target."""
    users = np.arange(len(targets))
    cases = Targets(users, np.zeros(len(targets), dtype=np.int64))
    return Split(
        name="golden",
        kind="leave-one-out",
        offsets=np.arange(len(targets) + 1),
        items=targets,
        train_end=np.zeros(len(targets), dtype=np.int64),
        valid=cases,
        test=cases,
        num_items=meta["sizes"]["items"],
        hash="",
        raw_users=tuple(map(str, users)),
    )
