"""UR4Rec V2: what its rows may read, its memory, its fusion, its losses, and real runs of its stages."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.config import DataConfig
from data.descriptions import Descriptions, DescriptionSettings
from data.negatives import UniformNegatives
from data.preference_batches import (
    NO_USER,
    EvaluationPreferences,
    PreferenceRows,
    ProfileSentences,
    TrainingPreferences,
    split_sentences,
)
from data.sources import read
from data.splits import Split, split
from models.sasrec import SASRec, SASRecConfig
from models.ur4rec.co_attention import CoAttention
from models.ur4rec.fusion import Fusion, standardised
from models.ur4rec.losses import Uncertainty, part_loss
from models.ur4rec.memory import NEVER, Memory
from models.ur4rec.v2 import UR4RecV2, no_candidates
from models.ur4rec.v2_config import FusionConfig, MemoryConfig, UR4RecV2Config
from tests.distributed.test_contrastive import two_processes

WINDOW, TEXT_WIDTH = 12, 24


@pytest.fixture(scope="module")
def parts() -> Split:
    config = DataConfig(source="sample", sample_users=40, sample_series=16)
    return split(read(config), config)


@pytest.fixture(scope="module")
def rows(parts: Split) -> PreferenceRows:
    config = DataConfig(source="sample", sample_users=40, sample_series=16)
    catalog, settings = read(config).catalog, DescriptionSettings(profile_every=4)
    described = Descriptions.of_templates(parts, catalog, settings)
    sentences = ProfileSentences.of(described, most=4)
    vectors = torch.randn(len(sentences.sentences), TEXT_WIDTH, generator=torch.Generator().manual_seed(1)).half()
    vectors[0] = 0
    return PreferenceRows(parts, sentences, vectors, WINDOW, known_users=True)


def model_of(parts: Split, **settings: Any) -> UR4RecV2:
    torch.manual_seed(0)
    sasrec = SASRec(SASRecConfig(hidden_size=8, window=WINDOW, num_blocks=1), parts.num_items)
    sentences = 2 if settings.get("co_attention") else 1
    texts = torch.nn.functional.normalize(torch.randn(parts.num_items + 1, sentences, TEXT_WIDTH), dim=2).half()
    texts[0], texts[3, 1:] = 0, 0  # padding, and an item of one sentence
    config = UR4RecV2Config(**({"hidden_size": 16, "num_heads": 2, "answers": "candidate"} | settings))
    return UR4RecV2(config, sasrec, texts, parts.num_users)


# --- What a row may read ---


def test_a_profile_has_read_nothing_from_the_target_on(rows: PreferenceRows) -> None:
    examples = TrainingPreferences(rows, cuts=1000, negatives=0, seed=0)
    batch = examples.collate(np.arange(len(examples.lengths)), epoch=0)
    described, seen = rows.profiles.descriptions, 0
    found = described.user_rows(batch.users.numpy(), batch.cuts.numpy())
    for user, cut, row, target in zip(batch.users, batch.cuts, found, batch.targets, strict=True):  # type: ignore[arg-type]
        assert described.as_of[row] <= cut
        assert int(cut) - described.as_of[row] < 4, "and it is the newest such text"
        assert target == rows.split.history(int(user), int(cut) + 1)[-1]
        seen += row > 0
    assert batch.vectors is not None
    read = batch.vectors[batch.sentences]
    assert torch.equal(read, rows.encoded[torch.from_numpy(rows.profiles.places[found])]), "it is what the rows hold"
    assert seen > len(found) / 2


def test_validation_and_test_read_the_last_profile_of_training(rows: PreferenceRows, parts: Split) -> None:
    described = rows.profiles.descriptions
    for phase in ("valid", "test"):
        targets = parts.targets(phase)
        read = described.user_rows(targets.user, targets.position)
        assert (described.as_of[read] == parts.train_end[targets.user]).all()


def test_histories_end_before_the_cut_and_every_cut_comes_once(rows: PreferenceRows, parts: Split) -> None:
    examples = TrainingPreferences(rows, cuts=3, negatives=5, seed=7)
    batch = examples.collate(np.array([4, 2]), epoch=1)
    assert len(batch.users) == 6
    assert batch.count == 6
    for i, (user, cut) in enumerate(zip(batch.users.tolist(), batch.cuts.tolist(), strict=True)):
        length = int(batch.history.lengths[i])
        expected = parts.history(user, cut)[-WINDOW:]
        assert batch.history.items[i, :length].tolist() == expected.tolist()
        assert 1 <= cut < parts.train_end[user]
        assert not set(batch.negatives[i].tolist()) & set(parts.training_items(user).tolist())  # type: ignore[index]
    assert batch.writes.view(2, 3).sum(1).tolist() == [1, 1]  # type: ignore[union-attr]
    alone = examples.collate(np.array([2]), epoch=1)
    assert alone.cuts.tolist() == batch.cuts[3:].tolist(), "whatever stands in the batch beside it"
    assert examples.collate(np.array([2]), epoch=2).cuts.tolist() != alone.cuts.tolist()


def test_sentences_are_cut_at_their_ends() -> None:
    assert split_sentences("Likes Drama. Dislikes War! Lately: A; B.", 8) == [
        "Likes Drama.",
        "Dislikes War!",
        "Lately: A; B.",
    ]
    assert split_sentences("One. Two. Three.", 2) == ["One.", "Two."]
    assert split_sentences("  ", 8) == []


# --- The retriever ---


def test_unit_length_keeps_the_first_loss_small(rows: PreferenceRows, parts: Split) -> None:
    """As the design notes have it: about 1 with vectors of length 1, about 100 without."""
    batch = TrainingPreferences(rows, cuts=4, negatives=20, seed=0).collate(np.arange(20), 0)
    settings: dict[str, Any] = {
        "loss": "published",
        "num_negatives": 20,
        "hidden_size": 256,
        "num_heads": 4,
        "residual": False,
    }
    losses = {}
    for normalize in (True, False):
        model = model_of(parts, normalize=normalize, **settings)
        losses[normalize] = model(batch).total.item() / batch.count
    assert losses[True] < 4
    assert losses[False] > 30


def test_experts_look_at_every_sentence(rows: PreferenceRows, parts: Split) -> None:
    """With one slot cross-attention would be constant; here each sentence and each event has its part."""
    model = model_of(parts).eval()
    batch = EvaluationPreferences(rows, "test").collate(np.array([0]))
    before = model.retriever_scores(batch)
    assert batch.vectors is not None
    for sentence in batch.sentences[0][batch.sentences[0] > 0]:
        changed = batch.vectors.clone()
        changed[sentence] = changed[sentence].flip(0)
        assert not torch.allclose(model.retriever_scores(replace(batch, vectors=changed)), before, atol=1e-4)
    items = batch.history.items.clone()
    items[0, 0] = items[0, 0] % parts.num_items + 1
    other = replace(batch, history=replace(batch.history, items=items))
    assert not torch.allclose(model.retriever_scores(other), before, atol=1e-4)


def test_a_user_without_any_text_is_scored(rows: PreferenceRows, parts: Split) -> None:
    model = model_of(parts).eval()
    batch = EvaluationPreferences(rows, "test").collate(np.arange(3))
    nothing = replace(batch, sentences=torch.zeros_like(batch.sentences), users=torch.full_like(batch.users, NO_USER))
    assert model(nothing)[:, 1:].isfinite().all()


@pytest.mark.parametrize("co_attention", [False, True])
@pytest.mark.parametrize("answers", ["candidate", "user"])
def test_chosen_candidates_score_as_in_the_catalogue(
    rows: PreferenceRows, parts: Split, answers: str, co_attention: bool
) -> None:
    model = model_of(parts, answers=answers, co_attention=co_attention).eval()
    known = model.read(EvaluationPreferences(rows, "test").collate(np.arange(5)))
    chosen = torch.randint(1, parts.num_items + 1, (5, 7), generator=torch.Generator().manual_seed(2))
    whole = model.ask_retriever(known)
    torch.testing.assert_close(
        model.ask_retriever(known, known.items.chosen(chosen)), whole.gather(1, chosen), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("settings", [{}, {"answers": "user", "co_attention": True}])
def test_candidates_in_parts_have_the_same_scores_and_gradients(
    rows: PreferenceRows, parts: Split, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    batch = TrainingPreferences(rows, cuts=2, negatives=0, seed=0).collate(np.arange(4), 0)
    gradients = []
    for at_once in (10_000, 17):
        monkeypatch.setattr("models.ur4rec.v2.AT_ONCE", at_once)
        model = model_of(parts, dropout=0.0, **settings)
        model(batch).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.retriever.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_co_attention_by_hand() -> None:
    """Two sentences of the user beside a third that is none; an item of two sentences and one of one."""
    torch.manual_seed(0)
    fit = CoAttention(UR4RecV2Config(hidden_size=4, num_heads=1, temperature=0.5))
    nn.init.normal_(fit.affinity.weight)
    preference, described = torch.randn(1, 3, 4), torch.randn(1, 2, 2, 4)
    described[0, 1, 1] = 0
    found = fit(preference, torch.tensor([[True, True, False]]), described.flatten(2))
    s, expected = preference[0, :2], []
    for d in (described[0, 0], described[0, 1, :1]):
        affinity = s @ fit.affinity.weight.T @ d.T / 0.5
        in_preference, in_description = affinity.softmax(0).T @ s, affinity.softmax(1) @ d
        expected.append(((d * in_preference).sum(1).mean() + (s * in_description).sum(1).mean()) / 2)
    torch.testing.assert_close(found[0], torch.stack(expected))
    assert fit(preference, torch.zeros(1, 3, dtype=torch.bool), described.flatten(2)).tolist() == [[0, 0]]


def test_co_attention_changes_scores_by_its_weight(rows: PreferenceRows, parts: Split) -> None:
    model = model_of(parts, answers="user", co_attention=True).eval()
    known = model.read(EvaluationPreferences(rows, "test").collate(np.arange(4)))
    scores = model.ask_retriever(known)
    nn.init.zeros_(model.retriever.co_attention.weight)  # type: ignore[union-attr]
    alone = model.ask_retriever(known)
    answer = model.retriever.answer(known.user, known.newest, known.memory)
    everything = known.items.each(lambda table: table[None])
    torch.testing.assert_close(alone, model.retriever.similarity(answer, everything.query))
    assert (scores - alone).abs()[:, 1:].min() > 0


def test_ids_out_of_range_are_errors(rows: PreferenceRows, parts: Split) -> None:
    model = model_of(parts).eval()
    batch = EvaluationPreferences(rows, "test").collate(np.arange(2))
    items = batch.history.items.clone()
    items[0, 0] = parts.num_items + 1
    with pytest.raises((IndexError, RuntimeError)):
        model(replace(batch, history=replace(batch.history, items=items)))
    with pytest.raises((IndexError, RuntimeError)):
        model(replace(batch, users=torch.tensor([0, parts.num_users])))


def test_every_trained_weight_gets_a_gradient(rows: PreferenceRows, parts: Split) -> None:
    """DDP waits for those that do not."""
    batch = TrainingPreferences(rows, cuts=2, negatives=0, seed=0).collate(np.arange(6), 0)
    for settings in (
        {},
        {"answers": "user", "co_attention": True},
        {"train": "joint", "init": Path("x"), "balance": "uncertainty", "fusion": FusionConfig(kind="user")},
    ):
        model = model_of(parts, **settings)
        model(batch).total.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        trained = any(p.requires_grad for p in model.sasrec.parameters())
        assert trained == (settings.get("train") == "joint")


def test_muted_rows_add_and_write_nothing(rows: PreferenceRows, parts: Split) -> None:
    model = model_of(parts)
    assert model.memory is not None
    batch = TrainingPreferences(rows, cuts=2, negatives=0, seed=0).collate(np.arange(6), 0).muted()
    out = model(batch)
    assert out.total == 0
    assert out.count == 0
    assert (model.memory.until == NEVER).all()


# --- Memory ---


def test_memory_never_knows_a_target(rows: PreferenceRows, parts: Split) -> None:
    """Epochs of random cuts: nothing that is read was written by an event from the cut on."""
    model = model_of(parts)
    memory, examples = model.memory, TrainingPreferences(rows, cuts=4, negatives=0, seed=3)
    assert memory is not None
    reads = 0
    for epoch in range(4):
        batch = examples.collate(np.arange(len(examples.lengths)), epoch, float(epoch))
        knows = memory.fits(batch.users, batch.cuts)
        assert (memory.until[batch.users][knows] <= batch.cuts[knows]).all()
        assert (memory.read(batch.users, batch.cuts)[~knows] == 0).all()
        model(batch)
        assert batch.writes is not None
        written = batch.users[batch.writes]
        assert memory.until[written].tolist() == batch.cuts[batch.writes].tolist()
        reads += int(knows.sum())
    assert reads > 100
    assert (memory.until <= torch.from_numpy(parts.train_end)).all()


def test_what_is_written_does_not_depend_on_the_target(rows: PreferenceRows, parts: Split) -> None:
    states = []
    batch = TrainingPreferences(rows, cuts=3, negatives=0, seed=0).collate(np.arange(5), 0)
    assert batch.targets is not None
    for targets in (batch.targets, batch.targets % parts.num_items + 1):
        model = model_of(parts, dropout=0.0)
        model(replace(batch, targets=targets))
        assert model.memory is not None
        states.append(model.memory.state.clone())
    assert torch.equal(*states)
    assert states[0].abs().sum() > 0


def test_a_step_writes_only_where_a_trigger_fires(rows: PreferenceRows, parts: Split) -> None:
    batch = TrainingPreferences(rows, cuts=3, negatives=0, seed=0).collate(np.arange(8), 0)
    explicit = model_of(parts, memory=MemoryConfig(triggers=["explicit"]))
    explicit(batch)
    assert explicit.memory is not None
    assert (explicit.memory.until == NEVER).all()
    later = EvaluationPreferences(rows, "valid").collate(np.arange(8))
    explicit.eval().remember(later)
    assert explicit.memory.until[later.users].tolist() == later.cuts.tolist()
    kept = explicit.memory.state.clone()
    explicit.remember(later)
    assert torch.equal(explicit.memory.state, kept), "there is nothing new"


def memory_of(**settings: Any) -> Memory:
    torch.manual_seed(0)
    return Memory(MemoryConfig(**settings), num_users=4, width=3)


def test_triggers() -> None:
    users, cuts, news = torch.arange(4), torch.tensor([5, 5, 5, 5]), torch.tensor([[1.0, 0.0, 0.0]] * 4)
    for settings, expected in (
        ({"triggers": ["count"], "every": 3}, [True, True, False, True]),  # 5 new events, 3, 1, and 5 anew
        ({"triggers": ["drift"]}, [True, False, True, True]),
        ({"triggers": ["time"], "epochs": 2.0}, [True, False, True, True]),
        ({"triggers": ["explicit"]}, [False] * 4),
        ({"triggers": ["explicit", "drift"]}, [True, False, True, True]),
    ):
        memory = memory_of(**settings)
        memory.until[:] = torch.tensor([NEVER, 2, 4, 7])  # nothing, some, most, and what the cut must not know
        memory.state[:] = torch.tensor([[0.0, 0, 0], [2, 0, 0], [-1, 0, 0], [1, 0, 0]])
        memory.written[:] = torch.tensor([0.0, 1.5, 0.5, 1.0])
        assert memory.fires(users, cuts, news, progress=3.0).tolist() == expected, settings


def test_a_write_keeps_most_of_the_memory_and_no_graph() -> None:
    memory = memory_of()
    before, news = torch.ones(1, 3), torch.ones(1, 3, requires_grad=True)
    after = memory.advance(before, news)
    torch.testing.assert_close(after, 0.95 * before + 0.05 * memory.cell(news, before))
    memory.write(torch.tensor([2]), torch.tensor([6]), after, torch.tensor([True]), progress=1.5)
    assert torch.equal(memory.state[2:3], after)
    assert not memory.state.requires_grad
    assert (memory.until[2], memory.written[2]) == (6, 1.5)
    assert memory.state[[0, 1, 3]].abs().sum() == 0


def write_own_rows(rank: int, chosen: Tensor) -> dict[str, Tensor]:
    memory = memory_of()
    users, cuts = torch.arange(4), torch.tensor([3, 4, 5, 6])
    values = torch.arange(12.0).view(4, 3)
    own = slice(0, 1) if rank == 0 else slice(1, 4)
    memory.write(users[own], cuts[own], values[own], chosen[own], progress=2.0)
    return {"state": memory.state, "until": memory.until}


def test_two_processes_hold_the_memory_of_one() -> None:
    chosen = torch.tensor([True, False, True, True])
    expected = memory_of()
    expected.write(torch.arange(4), torch.tensor([3, 4, 5, 6]), torch.arange(12.0).view(4, 3), chosen, progress=2.0)
    for found in two_processes(write_own_rows, chosen):
        assert torch.equal(found["state"].float(), expected.state)
        assert torch.equal(found["until"].long(), expected.until)


# --- Fusion and losses ---


def test_scores_are_on_one_scale_before_they_are_fused() -> None:
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    z = standardised(scores)
    torch.testing.assert_close(standardised(100 * scores + 7), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z[:, 1:].mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(z[:, 1:].std(1, correction=0), torch.ones(3))
    assert standardised(torch.zeros(2, 5)).isfinite().all()


def test_fixed_weights_reach_from_one_part_to_the_other() -> None:
    a, b = standardised(torch.randn(2, 20)), standardised(torch.randn(2, 20))
    fusion = Fusion(FusionConfig(sasrec_weight=0.25), 0)
    torch.testing.assert_close(fusion(a, b, torch.empty(2, 0)), 0.25 * a + 0.75 * b)
    for shift, expected in zip(fusion.choices()[[0, -1]], (b, a), strict=True):
        fusion.shift.copy_(shift)
        torch.testing.assert_close(fusion(a, b, torch.empty(2, 0)), expected)


def test_a_network_weighs_each_user_and_a_curriculum_begins_with_sasrec() -> None:
    torch.manual_seed(0)
    a, b, user = standardised(torch.randn(2, 20)), standardised(torch.randn(2, 20)), torch.randn(2, 5)
    fusion = Fusion(FusionConfig(kind="user", curriculum_epochs=4.0), 5).eval()
    weights = fusion.weight(a, b, user)
    assert weights[0] != weights[1]
    torch.testing.assert_close(fusion.logits(a, b, user, progress=0.0), a)
    torch.testing.assert_close(fusion.logits(a, b, user, progress=9.0), fusion(a, b, user))
    learned = Fusion(FusionConfig(kind="learned"), 5).eval()
    assert torch.equal(learned.weight(a, b, user), learned.weight(a, b, user + 1)), "it does not know the user"


def test_losses_by_hand() -> None:
    scores = torch.tensor([[2.0, -1.0, 0.5, 9.0]])
    masked, target, labels = torch.tensor([[True, False, False, True]]), torch.tensor([0]), torch.tensor([True])
    kept = scores[:, :3]
    softmax = part_loss(scores, target, masked, labels, "softmax")
    torch.testing.assert_close(softmax, -kept.log_softmax(1)[0, 0])
    bce = part_loss(scores, target, masked, labels, "bce")
    expected = torch.nn.functional.binary_cross_entropy_with_logits(kept, torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(bce, expected)
    bpr = part_loss(scores, target, masked, labels, "bpr")
    torch.testing.assert_close(bpr, -torch.tensor([3.0, 1.5]).sigmoid().log().mean())
    assert part_loss(scores, target, masked, ~labels, "softmax") == 0


def test_uncertainties_balance_and_do_not_vanish() -> None:
    balance = Uncertainty(["a", "b"])
    terms = {"a": torch.tensor(10.0), "b": torch.tensor(6.0)}
    assert balance(terms, 4) == 16
    balance(terms, 4).backward()
    assert balance.log_variance.grad.tolist() == [4 - 10, 4 - 6]  # type: ignore[union-attr]
    with torch.no_grad():
        balance.log_variance[0] = torch.tensor(2.5).log()
    torch.testing.assert_close(balance(terms, 4), torch.tensor(10 / 2.5 + 4 * np.log(2.5) + 6).float())


def test_hard_negatives_are_sasrecs_best_that_were_not_met(rows: PreferenceRows, parts: Split) -> None:
    model = model_of(parts, num_negatives=10, hard_share=0.3, in_batch=True)
    batch = TrainingPreferences(rows, cuts=2, negatives=10, seed=0).collate(np.arange(3), 0)
    _, scores = model.ask_sasrec(batch)
    masked = torch.zeros_like(scores, dtype=torch.bool).scatter(1, batch.history.items, True)
    drawn = model.draw(batch, scores, masked)
    assert drawn.shape == (6, 1 + 10 + 6)
    assert batch.targets is not None
    assert torch.equal(drawn[:, 0], batch.targets)
    for row in range(6):
        allowed = scores[row].clone()
        allowed[[0, *batch.history.items[row].tolist(), int(batch.targets[row])]] = -torch.inf
        assert drawn[row, 8:11].tolist() == allowed.topk(3).indices.tolist()
    assert isinstance(TrainingPreferences(rows, 2, 10, 0).negatives, UniformNegatives)
    assert torch.isfinite(model(batch).total)


def test_what_else_a_user_took_is_no_negative(rows: PreferenceRows, parts: Split) -> None:
    """In evaluation it is masked, too. Nothing of validation and test is known here."""
    batch = TrainingPreferences(rows, cuts=3, negatives=0, seed=0).collate(np.array([5, 1]), 0)
    masked = no_candidates(batch, parts.num_items + 1)
    assert batch.targets is not None
    for row, user in enumerate(batch.users.tolist()):
        assert masked[row].nonzero()[:, 0].tolist() == sorted({0, *parts.training_items(user).tolist()})
    scores = torch.zeros(masked.shape)
    loss = part_loss(scores, batch.targets, masked, batch.targets > 0, "softmax")
    candidates = 1 + parts.num_items - masked[:, 1:].sum(1)  # the target among them
    torch.testing.assert_close(loss, candidates.float().log().sum())


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"loss": "published"}, "--method.num_negatives"),
        ({"num_negatives": 5, "fusion": FusionConfig(kind="user")}, "--method.fusion.kind"),
        ({"train": "joint"}, "--method.init"),
        ({"hidden_size": 10}, "--method.num_heads"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        UR4RecV2Config(**settings)
