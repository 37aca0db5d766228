"""Learning rates by step, and which parameters decay."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from models.sasrec import SASRec, SASRecConfig
from trainers import state
from trainers.config import TrainConfig
from trainers.optimizer import build_optimizer, clipped_parts, learning_rate, set_learning_rate
from trainers.state import load_optimizer_state, optimizer_state_of


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", {0: 0.25, 3: 1, 4: 1, 9: 1, 11: 1}),
        ("linear", {0: 0.25, 1: 0.5, 3: 1, 4: 1, 8: 0.5, 11: 0.125, 12: 0, 99: 0}),
        ("cosine", {0: 0.25, 3: 1, 4: 1, 6: (1 + math.sqrt(0.5)) / 2, 8: 0.5, 10: (1 - math.sqrt(0.5)) / 2, 12: 0}),
    ],
)
def test_learning_rates(schedule, rates: dict[int, float]) -> None:
    """Twelve steps, four of them warm-up, peak 3."""
    config = TrainConfig(lr=3.0, schedule=schedule, warmup_steps=4)
    for step, rate in rates.items():
        assert learning_rate(step, 12, config) == pytest.approx(3 * rate, abs=1e-12), f"step {step}"


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_a_schedule_ends_at_the_part_of_the_peak_that_was_asked_for(schedule, middle: float) -> None:
    config = TrainConfig(lr=3.0, schedule=schedule, final_lr_ratio=0.1, warmup_steps=2)
    rates = [learning_rate(step, 10, config) / 3 for step in (0, 2, 6, 10, 11)]
    end = 1.0 if schedule == "constant" else 0.1
    assert rates == pytest.approx([0.5, 1.0, middle, end, end])


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert learning_rate(0, 10, TrainConfig(lr=0.5, schedule=schedule)) == 0.5  # type: ignore[arg-type]


def test_norms_biases_and_tables_do_not_decay() -> None:
    model = SASRec(SASRecConfig(hidden_size=8, num_blocks=1), num_items=5)
    optimizer = build_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.95)))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decayed = {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0.3}
    layers = ("query_key_value", "attention_out", "inner", "outer")
    assert decayed == {f"blocks.0.{layer}.weight" for layer in layers}
    assert all(decay[id(p)] == 0 for name, p in model.named_parameters() if name not in decayed)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_a_tied_table_does_not_decay_and_frozen_parameters_are_left_out() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 9, bias=False)  # comes first in parameters(), and still is a table
            self.table = nn.Embedding(9, 4)
            self.table.weight = self.head.weight
            self.free, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    model = Tied()
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1))
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert groups == {0.1: {id(model.free.weight)}, 0.0: {id(model.head.weight), id(model.free.bias)}}


def test_decay_shrinks_weights_by_the_rate_times_the_decay() -> None:
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer(layer, TrainConfig(lr=0.1, weight_decay=0.5))
    set_learning_rate(optimizer, 0.2)
    (layer.weight.sum() * 0 + layer.bias.sum() * 0).backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before[0] * (1 - 0.2 * 0.5))
    torch.testing.assert_close(layer.bias.detach(), before[1])


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--backbone\.adapter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), TrainConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": -1},
        {"patience": 0},
        {"keep_checkpoints": 0},
        {"micro_batch_size": -1},
        {"eval_every_steps": 0},
        {"lr": 0.0},
        {"weight_decay": -0.1},
        {"warmup_steps": -1},
        {"max_grad_norm": -1.0},
        {"final_lr_ratio": 1.5},
    ],
)
def test_settings_without_a_meaning_are_refused_by_their_flag(settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"--train\.{name} is {settings[name]}"):
        TrainConfig(**settings)  # type: ignore[arg-type]


def test_parameters_have_rates_of_their_own() -> None:
    model = SASRec(SASRecConfig(hidden_size=8, num_blocks=2), num_items=5)
    multipliers = {"item_embedding": 0.1, "blocks": 2.0, "blocks.1": 3.0}
    optimizer = build_optimizer(model, TrainConfig(lr=0.5, lr_multipliers=multipliers))
    set_learning_rate(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert by_name["item_embedding.weight"] == pytest.approx(0.01)
    assert {round(by_name[n], 6) for n in by_name if n.startswith("blocks.0.")} == {0.2}
    assert {round(by_name[n], 6) for n in by_name if n.startswith("blocks.1.")} == {0.3}
    assert by_name["final_norm.weight"] == pytest.approx(0.1)


def test_frozen_parameters_stay_as_they_are_until_their_epochs_are_over() -> None:
    model = nn.ModuleDict({"table": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 2, bias=False)})
    optimizer = build_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.1, frozen_epochs={"table": 2}))
    for epoch in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        set_learning_rate(optimizer, 0.1, epoch)
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}
        assert moved == {"table.weight": epoch >= 2, "head.weight": True}


def test_parts_are_clipped_by_the_longest_beginning_of_their_names() -> None:
    model = SASRec(SASRecConfig(hidden_size=8, num_blocks=2), num_items=5)
    norms = {"blocks": 2.0, "blocks.1": 3.0}
    config = TrainConfig(max_grad_norm=1.0, max_grad_norms=norms, weight_decay=0.1, lr_multipliers={"blocks.0": 0.5})
    names = {id(p): name for name, p in model.named_parameters()}
    found = clipped_parts(build_optimizer(model, config))
    parts = {part.max_norm: [names[id(p)] for p in part.parameters] for part in found}
    assert sorted(parts) == [1.0, 2.0, 3.0]
    assert {name.startswith("blocks") for name in parts[1.0]} == {False}
    assert {name[:8] for name in parts[2.0]} == {"blocks.0"}, "whatever their rates and decays"
    assert {name[:8] for name in parts[3.0]} == {"blocks.1"}
    assert sum(map(len, parts.values())) == len(names)
    assert clipped_parts(build_optimizer(model, TrainConfig(max_grad_norm=1.0))) == [], "all are clipped as one"


def test_a_norm_below_zero_or_for_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"--train\.max_grad_norms has bias: -1"):
        TrainConfig(max_grad_norms={"bias": -1.0})
    with pytest.raises(ValueError, match=r"max_grad_norms has gate.*names begin with bias, weight"):
        build_optimizer(nn.Linear(2, 2), TrainConfig(max_grad_norms={"gate": 2.0}))


def test_a_rate_for_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"lr_multipliers has gate.*names begin with bias, weight"):
        build_optimizer(nn.Linear(2, 2), TrainConfig(lr_multipliers={"gate": 2.0}))


def test_moments_of_eight_bits_come_back_from_a_checkpoint() -> None:
    """Both go on alike from there; CPUs have no paging, and say so."""
    config = TrainConfig(optimizer="adamw-8bit-paged", lr=0.01)
    torch.manual_seed(0)
    first, second = nn.Linear(128, 64), nn.Linear(128, 64)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 128)).pow(2).sum().backward()
        optimizer.step()

    optimizer = build_optimizer(first, config)
    step(first, optimizer)
    assert optimizer.state[first.weight]["state1"].dtype == torch.uint8
    second.load_state_dict(first.state_dict())
    other = build_optimizer(second, config)
    saved = {name: value.clone() for name, value in optimizer_state_of(first, optimizer, None).items()}
    load_optimizer_state(second, other, None, saved)
    step(first, optimizer)
    step(second, other)
    assert torch.equal(first.weight, second.weight)


def test_loaded_moments_of_a_paged_optimizer_go_back_to_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Accelerate has wrapped it, as in every run."""
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    paged: list[object] = []
    monkeypatch.setattr(state, "page_again", paged.append)
    load_optimizer_state(layer, wrapped, None, {})
    assert not paged
    optimizer.is_paged = True  # type: ignore[attr-defined]
    load_optimizer_state(layer, wrapped, None, {})
    assert paged == [optimizer]
