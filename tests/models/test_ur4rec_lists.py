"""UR4Rec of the paper: who sees whom among proxies, candidates and texts; both losses; five rankers."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batches import NO_LABEL, SequenceBatch
from data.candidate_lists import CandidateBatch
from models.ur4rec.proxies import PreferenceRetriever, PreferenceSettings, seen_by
from models.ur4rec.reranking import (
    UR4Rec,
    UR4RecConfig,
    UR4RecPretrain,
    UR4RecPretrainConfig,
    contrastive_loss,
    matching_loss,
    most_similar,
    real_texts,
)

ITEMS, TEXT, WIDTH = 30, 6, 8
SMALL = PreferenceSettings(num_proxies=3, hidden_size=16, num_blocks=2, num_heads=2, dropout=0.0)


def a_batch(candidates: int = 5, rows: int = 4, seed: int = 0) -> CandidateBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([4, 1, 3, 2])[:rows]
    items = torch.randint(1, ITEMS + 1, (rows, 4), generator=generator) * (torch.arange(4) < lengths[:, None])
    drawn = torch.stack([torch.randperm(ITEMS, generator=generator)[:candidates] + 1 for _ in range(rows)])
    texts = torch.randn(rows, 5, TEXT, generator=generator).half()
    answers = torch.randint(0, candidates, (rows,), generator=generator)
    return CandidateBatch(SequenceBatch(items, lengths), drawn, texts, answers, count=rows)


def a_retriever(**changes: Any) -> PreferenceRetriever:
    torch.manual_seed(0)
    return PreferenceRetriever(replace(SMALL, **changes), WIDTH, TEXT).eval()


def changed(vectors: Tensor, place: int) -> Tensor:
    other = vectors.clone()
    other[:, place] += 1
    return other


def test_the_mask_of_one_pass() -> None:
    see, blind = (seen_by(2, 3, sees).int().tolist() for sees in (True, False))
    items = [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert see == [[1, 1, 1, 1, 1]] * 2 + items
    assert blind == [[1, 1, 0, 0, 0]] * 2 + items
    assert seen_by(0, 2, True).int().tolist() == [[1, 0], [0, 1]]  # items alone still see themselves


@pytest.mark.parametrize(
    ("settings", "list_matters"),
    [({}, True), ({"proxies_see_items": False}, False), ({"candidates_at_once": False}, False)],
)
def test_candidates_reach_each_other_only_through_proxies_that_see_them(settings: dict, list_matters: bool) -> None:
    retriever, batch = a_retriever(**settings), a_batch()
    items = torch.randn(4, 5, WIDTH)
    said = retriever(items, batch.texts, real_texts(batch))
    other = retriever(changed(items, 2), batch.texts, real_texts(batch))
    assert said.shape == (4, 5, 16)
    assert not torch.allclose(said[:, 2], other[:, 2], atol=1e-3)
    others = [0, 1, 3, 4]
    assert torch.allclose(said[:, others], other[:, others], atol=1e-5) != list_matters
    alone = retriever(items, None, None)
    assert torch.allclose(alone[:, others], retriever(changed(items, 2), None, None)[:, others])


def test_each_candidate_with_proxies_of_its_own_is_a_pass_of_its_own() -> None:
    retriever, batch, items = a_retriever(candidates_at_once=False), a_batch(), torch.randn(4, 5, WIDTH)
    said = retriever(items, batch.texts, real_texts(batch))
    for place in range(5):
        tokens = retriever._run(items[:, place : place + 1], batch.texts, real_texts(batch))
        assert torch.allclose(said[:, place], tokens[:, :3].mean(1), atol=1e-6)


def test_every_text_that_is_there_is_read_as_a_token_of_its_own() -> None:
    retriever, batch = a_retriever(), a_batch()
    assert batch.texts is not None
    real = real_texts(batch)
    assert real.sum(1).tolist() == [5, 2, 4, 3]  # the user's and those of the history
    proxies = retriever(None, batch.texts, real)
    assert proxies.shape == (4, 3, 16)
    for place in range(5):
        other = retriever(None, changed(batch.texts, place), real)
        same = torch.isclose(proxies, other, atol=1e-6).flatten(1).all(1)
        assert same.tolist() == (~real[:, place]).tolist()
    # With one token attention would be constant: its weights must depend on what is asked.
    shuffled = torch.cat([batch.texts[:, :1], batch.texts[:, 1:].flip(1)], dim=1)
    full = real.all(1)
    assert torch.allclose(retriever(None, shuffled, real)[full], proxies[full], atol=1e-5)  # a set but for the user's


def test_the_most_similar_proxy_counts() -> None:
    proxies = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    items = torch.tensor([[[3.0, 3.0], [-1.0, 0.0], [0.0, 5.0]]])
    assert most_similar(proxies, items)[0].tolist() == pytest.approx([math.sqrt(0.5), 0.0, 1.0])


def test_losses_by_hand() -> None:
    logits, answers = torch.tensor([[1.0, 2.0, 0.0], [5.0, 5.0, 5.0]]), torch.tensor([1, NO_LABEL])
    e = math.e
    with_positive = -math.log(e**2 / (e + e**2 + 1))
    as_printed = -math.log(e**2 / (e + 1))
    assert contrastive_loss(logits, answers, True).item() == pytest.approx(with_positive)
    assert contrastive_loss(logits, answers, False).item() == pytest.approx(as_printed)
    softplus = [math.log1p(math.exp(x)) for x in (1.0, -2.0, 0.0)]  # -log s(2) of the target, -log(1 - s) of the others
    assert matching_loss(logits, answers).item() == pytest.approx(sum(softplus) / 3)
    nothing = torch.tensor([NO_LABEL, NO_LABEL])
    assert contrastive_loss(logits, nothing, False).item() == matching_loss(logits, nothing).item() == 0


def test_the_first_stage_adds_up_its_losses() -> None:
    torch.manual_seed(0)
    config = UR4RecPretrainConfig(hidden_size=WIDTH, num_candidates=5, matching_weight=0.3, preferences=SMALL)
    model = UR4RecPretrain(config, ITEMS, TEXT)
    batch = a_batch()
    loss = model(batch)
    loss.total.backward()
    assert loss.total.item() == pytest.approx((loss.parts["contrastive"] + 0.3 * loss.parts["matching"]).item())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model(batch.muted()).total.item() == 0


def a_model(ranker: str, augment: bool = True) -> UR4Rec:
    torch.manual_seed(0)
    config = UR4RecConfig(
        ranker=ranker,  # type: ignore[arg-type]
        augment=augment,
        hidden_size=WIDTH,
        num_candidates=5,
        history_length=4,
        dropout=0.0,
        preferences=SMALL,
    )
    return UR4Rec(config, ITEMS, TEXT).eval()


RANKERS = ["dlcm", "prm", "setrank", "gru4rec", "sasrec"]


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("ranker", RANKERS)
def test_a_ranker_scores_its_list_and_learns_with_all_its_weights(ranker: str, augment: bool) -> None:
    model, batch = a_model(ranker, augment), a_batch()
    loss = model.train()(batch)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.numel() > 1)
    assert model(batch.muted()).total.item() == 0
    asked = replace(batch, row=torch.arange(4), answers=None)
    scores = model.eval()(asked)
    assert scores.shape == (4, ITEMS + 1)
    assert torch.equal(scores.isfinite().sum(1), torch.full((4,), 5))
    assert torch.equal(scores.gather(1, batch.candidates), model.list_scores(batch))
    losses = torch.log_softmax(model.list_scores(batch), 1).gather(1, batch.answers[:, None])
    assert model(batch).total.item() == pytest.approx(-losses.sum().item(), rel=1e-5)


@pytest.mark.parametrize("ranker", RANKERS)
def test_texts_change_scores_only_where_they_are_read(ranker: str) -> None:
    batch = a_batch()
    assert batch.texts is not None
    other = replace(batch, texts=batch.texts.flip(0))
    with_texts, alone = a_model(ranker), a_model(ranker, augment=False)
    assert not torch.allclose(with_texts.list_scores(batch), with_texts.list_scores(other), atol=1e-5)
    assert torch.equal(alone.list_scores(batch), alone.list_scores(other))


@pytest.mark.parametrize(("ranker", "order_matters"), [(r, r in ("dlcm", "prm")) for r in RANKERS])
def test_places_in_the_list_matter_to_rankers_of_ordered_lists(ranker: str, order_matters: bool) -> None:
    model, batch = a_model(ranker), a_batch()
    turned = replace(batch, candidates=batch.candidates.flip(1))
    assert torch.allclose(model.list_scores(turned).flip(1), model.list_scores(batch), atol=1e-5) != order_matters


@pytest.mark.parametrize(("ranker", "list_matters"), [(r, r in ("dlcm", "prm", "setrank")) for r in RANKERS])
def test_comparing_rankers_see_the_whole_list(ranker: str, list_matters: bool) -> None:
    model, batch = a_model(ranker, augment=False), a_batch()
    other = batch.candidates.clone()
    other[:, -1] = batch.candidates[:, -1] % ITEMS + 1
    scores, again = (model.list_scores(replace(batch, candidates=c))[:, :-1] for c in (batch.candidates, other))
    assert torch.allclose(scores, again, atol=1e-6) != list_matters


def test_dlcm_reads_the_list_from_its_end_and_weighs_each_candidate_by_what_it_has_read() -> None:
    ranker: Any = a_model("dlcm").ranker
    x, state, states = torch.randn(2, 5, WIDTH), torch.zeros(1, 2, WIDTH), []
    for place in range(4, -1, -1):
        state = ranker.gru(x[:, place : place + 1], state)[1]
        states.insert(0, state[0])
    expected = torch.stack([s * ranker.context(states[0]).tanh() for s in states], dim=1)
    assert torch.allclose(ranker.compare(x), expected, atol=1e-6)


def test_history_rankers_start_from_the_vectors_of_ids() -> None:
    model, batch = a_model("sasrec"), a_batch()
    join: Any = model.ranker.join
    join.weight.data[:, WIDTH:] = 0
    state = model.ranker.body.user_states(batch.history)  # type: ignore[union-attr,operator]
    expected = torch.einsum("bh,bch->bc", state, model.ranker.item_embedding(batch.candidates))
    assert torch.allclose(model.list_scores(batch), expected, atol=1e-5)


def test_settings_that_contradict_each_other_are_refused(tmp_path) -> None:
    for wrong, message in [
        ({"init": tmp_path, "augment": False}, "goes with --method.augment true"),
        ({"negatives": "hard"}, "pass --method.retriever"),
        ({"num_heads": 3}, "must divide --method.hidden_size"),
        ({"num_candidates": 1}, "--method.num_candidates 1: expected at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            UR4RecConfig(**wrong)
    with pytest.raises(ValueError, match="temperature 0"):
        UR4RecPretrainConfig(temperature=0)
    with pytest.raises(ValueError, match=r"must divide --method.preferences.hidden_size"):
        PreferenceSettings(num_heads=3)
