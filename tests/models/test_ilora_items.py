"""iLoRA's items: states that are read, the gate, the space of the match, distillation, and runs from end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.processes import run, start
from data.batches import SequenceBatch
from data.config import DataConfig
from data.item_examples import EvaluationItemPrompts, TrainingItemPrompts
from data.item_prompts import ItemPromptLayout, ItemPromptSettings
from data.sources import read
from data.splits import split
from models.backbone import BackboneConfig, causal_model, load_backbone, load_tokenizer
from models.e4srec import token_norm
from models.expert_gates import GateConfig
from models.ilora_items import ILoRAItems, ILoRAItemsConfig
from models.lrurec import LRURec, LRURecConfig
from models.moe_lora import add_moe_lora
from models.sasrec import SASRec, SASRecConfig
from models.sasrec_llara import SASRecLLaRA
from models.tiny import TinyConfig

SAMPLE = DataConfig(source="sample", sample_users=24, sample_series=10)
WIDTH, SASREC_WIDTH, HISTORY = 32, 12, 8
ROWS = np.arange(7)


@pytest.fixture(scope="module")
def sample():
    interactions = read(SAMPLE)
    return interactions.catalog, split(interactions, SAMPLE)


class Case:
    """A model of random weights in float64, with its examples."""

    def __init__(self, sample, *, gated=False, checkpointed=False, sasrec=None, titles=False, mode="auto", **settings):
        catalog, parts = sample
        prompts = ItemPromptSettings("Films of one user:\n", "\nNext:\n", titles=titles, mode=mode, max_history=HISTORY)
        tiny = BackboneConfig(tiny=TinyConfig(hidden_size=WIDTH, layers=2), gradient_checkpointing=checkpointed)
        tokenizer = load_tokenizer(tiny, [*catalog.titles[1:], prompts.instruction, prompts.response])
        backbone = load_backbone(tiny, tokenizer, seed=0, device="cpu", trainable=True, head=False)
        torch.manual_seed(0)
        if gated:
            add_moe_lora(causal_model(backbone), rank=4, experts=2, scale=4.0)
            for name, parameter in backbone.named_parameters():
                if name.endswith("lora_B"):
                    torch.nn.init.normal_(parameter, std=0.1)  # as after some steps: at zero the experts say nothing
        self.sasrec = sasrec or random_sasrec(catalog.num_items)
        self.norm = token_norm(backbone)
        self.model = ILoRAItems(ILoRAItemsConfig(prompts=prompts, **settings), backbone, self.sasrec).double().train()
        shared = {"gated": gated, "with_history": True}
        causal_without_cache = not checkpointed
        self.layout = ItemPromptLayout.build(
            tokenizer, catalog, prompts, causal=True, shares_prefix=causal_without_cache, **shared
        )
        self.training = TrainingItemPrompts(parts, self.layout, prompts)
        self.evaluation = EvaluationItemPrompts(parts, "test", self.layout, HISTORY)
        self.batch = self.training.collate(ROWS, epoch=0)

    def gradients(self):
        self.model.zero_grad()
        self.model.loss(self.batch).total.backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def random_sasrec(num_items, dropout=0.0):
    sasrec = SASRec(SASRecConfig(hidden_size=SASREC_WIDTH, window=HISTORY, dropout=dropout), num_items)
    for parameter in sasrec.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return sasrec


def inner_recommender(name, num_items):
    if name == "published":
        return SASRecLLaRA(num_items, SASREC_WIDTH)
    if name == "lrurec":
        return LRURec(LRURecConfig(hidden_size=SASREC_WIDTH, window=HISTORY, dropout=0.0), num_items)
    return random_sasrec(num_items)


def users_of(case, batch):
    """The recommender's state of every row, from its own method."""
    return case.model.sasrec.user_states(batch.history)


@pytest.mark.parametrize("space", ["backbone", "sasrec"])
@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("gated", [False, True])
def test_scores_are_those_of_a_naive_computation(sample, space, projector, gated):
    case = Case(sample, space=space, projector=projector, gated=gated, mode="prefix")
    model = case.model.float().eval()
    batch = case.evaluation.collate(ROWS)
    scores = model.scores(batch)
    with torch.no_grad():
        for row in ROWS:
            alone = case.evaluation.collate(np.array([row]))
            history = alone.slot_items
            shown = SequenceBatch(history[None], torch.tensor([len(history)]))
            states = model.sasrec.states(shown)[0]
            body = causal_model(model.backbone)
            embed = body.get_input_embeddings()
            before, after = (embed(torch.from_numpy(ids)) for ids in (case.layout.before, case.layout.after))
            embeds = torch.cat([before, model.input.projector(states), after])[None]
            if gated:
                with model.active.use(model.gate(states[-1:])):
                    state = body(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
            else:
                state = body(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
            table = model.sasrec.item_table
            if space == "backbone":
                naive = model.input.projector(table) @ state
            else:
                naive = table @ model.output.state_projector(state)
            # A linear projector's bias adds the same to every item, and is left out.
            difference = (scores[row] - naive)[1:]
            torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=0, atol=1e-4)
            assert scores[row, 0] == -torch.inf
            assert naive[1:].std() > 0.01


def test_the_item_table_has_one_name_and_vectors_have_the_norm_of_tokens(sample):
    case = Case(sample, train_sasrec=True)
    assert [n for n, p in case.model.named_parameters() if p is case.sasrec.item_table] == [
        "sasrec.item_embedding.weight"
    ]
    assert not case.model.saved_buffers
    items = torch.arange(1, len(case.sasrec.item_table))
    states = case.model.sasrec.eval().states(SequenceBatch(items[:, None], torch.ones_like(items)))[:, 0]
    assert case.model.input.projector(states).norm(dim=1).mean().item() == pytest.approx(case.norm, rel=0.1)
    by_table = Case(sample, vectors="table", projector="linear").model
    assert by_table.input.vectors()[1:].norm(dim=1).mean().item() == pytest.approx(case.norm, rel=1e-4)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_gate_is_each_users_own(sample, per_layer):
    case = Case(sample, gated=True, vectors="table", gate=GateConfig(per_layer=per_layer))
    model, batch = case.model.float().eval(), case.evaluation.collate(ROWS)
    torch.nn.init.normal_(model.gate.router.weight)
    gate = model.mix(model.events(batch), batch)
    assert gate.ndim == (3 if per_layer else 2)
    torch.testing.assert_close(gate, model.gate(users_of(case, batch)))
    assert gate.std(dim=-2).max() > 0.1
    # The same prompts with the other users' histories for the gate alone: only their mix of experts is another one.
    turned = SequenceBatch(batch.history.items.roll(1, 0), batch.history.lengths.roll(1, 0))
    assert not torch.allclose(model.scores(batch), model.scores(replace(batch, history=turned)), atol=1e-4)


def test_a_gate_has_one_prompt_a_target_and_shares_no_tokens(sample):
    case = Case(sample, gated=True)
    assert case.batch.prefix_ids is None
    assert len(case.batch.labelled) == len(case.batch.input_ids)
    with pytest.raises(ValueError, match=r"mode positions.*--method.prompts.mode prefix, or --backbone.adapter lora"):
        Case(sample, gated=True, mode="positions")


def test_a_frozen_recommender_gets_no_gradient_and_no_dropout(sample):
    case = Case(sample, gated=True, space="sasrec", distillation="mse")
    assert case.model.training
    assert not any(module.training for module in case.model.sasrec.modules())
    assert not any(name.startswith("sasrec") for name in case.gradients())
    assert torch.equal(case.model.events(case.batch), case.model.events(case.batch))
    trained = Case(sample, train_sasrec=True, sasrec=random_sasrec(sample[0].num_items, dropout=0.5))
    assert all(module.training for module in trained.model.sasrec.modules())
    assert not torch.equal(trained.model.events(case.batch), trained.model.events(case.batch))


@pytest.mark.parametrize("vectors", ["table", "states"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("space", ["backbone", "sasrec"])
@pytest.mark.parametrize("inner", ["sasrec", "published", "lrurec"])
@pytest.mark.parametrize("match", ["dot", "cosine"])
def test_all_that_is_trained_gets_a_gradient(sample, vectors, gated, space, inner, match):
    """What would not, DDP would wait for."""
    sasrec = inner_recommender(inner, sample[0].num_items)
    settings = {"vectors": vectors, "space": space, "match": match, "distillation": "kl"}
    case = Case(sample, gated=gated, train_sasrec=True, sasrec=sasrec, **settings)
    gradients = case.gradients()
    trained = {name for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    assert trained == gradients.keys()
    assert gradients["sasrec.item_embedding.weight"].any()
    reads_states = vectors == "states" or gated
    layers = {name for name in trained if name.startswith("sasrec.") and name != "sasrec.item_embedding.weight"}
    assert bool(layers) == reads_states


def test_the_table_learns_from_the_match_and_from_the_states(sample):
    """Items of no history learn as what is not the target; those of histories from what is made of them, too."""
    case = Case(sample, train_sasrec=True, space="sasrec")
    case.batch = case.training.collate(ROWS[:1], epoch=0)
    whole = case.gradients()["sasrec.item_embedding.weight"]
    seen = torch.zeros(len(whole), dtype=torch.bool)
    seen[case.batch.slot_items] = True
    table = case.sasrec.item_table
    states = case.model.read(case.batch).detach()
    (by_match,) = torch.autograd.grad(case.model.output.loss(states, case.batch.targets), table)
    torch.testing.assert_close(whole[~seen], by_match[~seen])
    assert not torch.isclose(whole[seen], by_match[seen]).all(dim=1).any()


@pytest.mark.parametrize("mode", ["positions", "prefix"])
@pytest.mark.parametrize("kind", ["mse", "cosine", "kl"])
def test_distillation_is_what_is_computed_by_hand(sample, mode, kind):
    case = Case(sample, mode=mode, space="sasrec", distillation=kind, distillation_weight=0.3, temperature=2.0)
    model, batch = case.model, case.batch
    loss = model.loss(batch)
    row_states = model.sasrec.states(batch.history)
    if mode == "prefix":
        users = users_of(case, batch)
    else:  # every item of a row names the next one
        users = torch.cat([states[:n] for states, n in zip(row_states, batch.history.lengths, strict=True)])
    mapped, table = model.output.state_projector(model.read(batch)), model.sasrec.item_table[1:]
    found, wanted = ((states @ table.T / 2).log_softmax(1) for states in (mapped, users))
    by_hand = {
        "mse": sum(F.mse_loss(q, u) for q, u in zip(mapped, users, strict=True)),
        "cosine": F.cosine_embedding_loss(mapped, users, torch.ones(len(users)), reduction="sum"),
        "kl": 4 * F.kl_div(found, wanted, reduction="sum", log_target=True),
    }[kind]
    torch.testing.assert_close(loss.parts["distillation"], by_hand.detach(), rtol=1e-9, atol=1e-9)
    ranking = F.cross_entropy(mapped @ table.T, batch.targets - 1, reduction="sum")
    torch.testing.assert_close(loss.parts["ranking"], ranking.detach())
    torch.testing.assert_close(loss.total, ranking + 0.3 * by_hand)
    assert loss.count == len(batch.targets)
    muted = model.loss(batch.muted())
    assert muted.total == muted.parts["distillation"] == 0


@pytest.mark.parametrize("kind", ["mse", "cosine", "kl"])
def test_distillation_is_zero_where_the_model_says_what_the_recommender_says(sample, kind, monkeypatch):
    case = Case(sample, mode="prefix", space="sasrec", distillation=kind, train_sasrec=True)
    states, users = case.model.read(case.batch), users_of(case, case.batch).detach()
    monkeypatch.setattr(case.model.output.state_projector, "forward", lambda states: users)
    events = torch.zeros(len(users), HISTORY, SASREC_WIDTH, dtype=torch.float64)
    events[torch.arange(len(users)), case.batch.history.lengths - 1] = users
    events.requires_grad_()
    distance = case.model.distillation_loss(states, events, case.batch)
    torch.testing.assert_close(distance, torch.zeros_like(distance), atol=1e-12, rtol=0)
    other = case.model.distillation_loss(states, events + 0.1 * torch.randn_like(events), case.batch)
    assert other > 1e-3
    assert torch.autograd.grad(other + case.sasrec.item_table.sum(), events, allow_unused=True) == (None,)


@pytest.mark.parametrize("inner", ["published", "lrurec"])
def test_a_recommender_teaches_what_it_scores(sample, inner):
    """The published one has a layer for its scores, and LRURec a bias for each item."""
    sasrec = inner_recommender(inner, sample[0].num_items)
    torch.nn.init.normal_(sasrec.item_scores.bias if inner == "published" else sasrec.item_bias)
    case = Case(sample, mode="prefix", sasrec=sasrec, distillation="kl")
    users = users_of(case, case.batch)
    biased = users @ sasrec.item_table.T + sasrec.item_bias if inner == "lrurec" else sasrec.item_scores(users)
    teacher = biased[:, 1:].log_softmax(1)
    logits = case.model.read(case.batch) @ case.model.input.vectors()[1:].T
    by_hand = F.kl_div(logits.log_softmax(1), teacher, reduction="sum", log_target=True)
    torch.testing.assert_close(case.model.loss(case.batch).parts["distillation"], by_hand.detach())


def test_users_without_a_history_are_not_distilled(sample):
    case = Case(sample, space="sasrec", distillation="mse", mode="prefix")
    prompts = replace(case.model.config.prompts, empty_history=True)
    case.model.config.prompts = prompts
    batch = TrainingItemPrompts(sample[1], case.layout, prompts).collate(ROWS, epoch=0)
    empty = batch.history.lengths == 0
    assert 0 < empty.sum() < len(empty)
    mapped = case.model.output.state_projector(case.model.read(batch))
    by_hand = (mapped - users_of(case, batch)).square().mean(1)[~empty].sum()
    torch.testing.assert_close(case.model.loss(batch).parts["distillation"], by_hand.detach())
    nobody_known, _, ends = case.layout.batch([np.array([], np.int64)] * 2)
    assert case.model.read(replace(nobody_known, labelled=torch.from_numpy(ends))).isfinite().all()


@pytest.mark.parametrize("titles", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_every_position_is_trained_on_what_its_history_alone_says(sample, titles, published):
    sasrec = SASRecLLaRA(sample[0].num_items, SASREC_WIDTH) if published else random_sasrec(sample[0].num_items)
    if not published:  # our SASRec counts positions from the newest event, so they move with the length of a history
        torch.nn.init.zeros_(sasrec.position_embedding.weight)
    case = Case(sample, sasrec=sasrec, titles=titles, mode="positions")
    model, batch = case.model.eval(), case.batch
    together = model.read(batch)
    width = batch.input_ids.shape[1]
    for i, slot in enumerate(batch.labelled):
        seen = batch.slot_items[(batch.item_slots <= slot) & (batch.item_slots // width == slot // width)]
        alone, _, ends = case.layout.batch([seen.numpy()])
        state = model.read(replace(alone, labelled=torch.from_numpy(ends)))
        torch.testing.assert_close(together[i], state[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("vectors", ["table", "states"])
def test_gradient_checkpointing_changes_no_gradient(sample, vectors):
    settings = {"gated": True, "vectors": vectors, "train_sasrec": True, "distillation": "kl"}
    results = []
    for checkpointed in (False, True):
        case = Case(sample, checkpointed=checkpointed, **settings)
        assert causal_model(case.model.backbone).is_activation_checkpointing == checkpointed
        results.append(case.gradients())
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation": "mse"}, "--method.space sasrec"),
        ({"distillation": "cosine", "space": "backbone"}, "--method.space sasrec"),
        ({"distillation": "kl", "temperature": 0.0}, "--method.temperature 0.0"),
        ({"distillation": "kl", "distillation_weight": -1.0}, "--method.distillation_weight -1.0"),
    ],
)
def test_settings_that_do_not_go_together_name_the_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        ILoRAItemsConfig(**settings)


SMALL = (
    "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.precision fp32 --train.trackers [] "
    "--train.epochs 4 --train.batch_size 32 --train.lr 0.01"
).split()
SASREC = ["--model", "sasrec", *SMALL, "--method.hidden_size", "16"]
ITEMS = ["--model", "ilora-items", *SMALL, "--method.prompts.max_history", "20"]
TINY = ["--backbone.tiny.hidden_size", "32", "--backbone.tiny.layers", "1"]


@pytest.fixture(scope="module")
def sasrec_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sasrec"
    assert run(*SASREC, output=folder).wait() == 0
    return folder


@pytest.mark.slow
def test_a_run_trains_evaluates_and_recommends(sasrec_run, tmp_path):
    flags = [*TINY, "--method.space=sasrec", "--method.distillation=cosine", "--method.train_sasrec=true"]
    flags += ["--train.lr_multipliers", '{"sasrec": 0.1}', f"--method.sasrec={sasrec_run}"]
    trained = run(*ITEMS, *flags, output=tmp_path / "run")
    assert trained.wait() == 0, trained.text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["NDCG@10"] > 1.5 * results["popularity"]["NDCG@10"]
    measured = start(output=tmp_path / "run", script="evaluate")
    assert measured.wait() == 0, measured.text()
    assert f"{results['test']['NDCG@10']:.4f}" in measured.text()
    recommended = start("--user", "3", "-k", "5", output=tmp_path / "run", script="recommend")
    assert recommended.wait() == 0, recommended.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--method.sasrec, a run of sasrec, gru4rec or lrurec"),
        (["--method.sasrec={sasrec}", "--method.prompts.max_history=300"], "--method.prompts.max_history 50"),
        (["--method.sasrec={sasrec}", "--method.distillation=mse"], "--method.space sasrec"),
        (["--method.sasrec={sasrec}/nothing.safetensors"], "no such file"),
    ],
)
def test_what_cannot_be_had_ends_the_run_with_the_flag(sasrec_run, tmp_path, flags, message):
    failed = run(*ITEMS, *TINY, *(flag.format(sasrec=sasrec_run) for flag in flags), output=tmp_path / "run")
    assert failed.wait() != 0
    assert message in failed.text()
