"""BIGRec: what its loss counts, and that every way to score ends in a ranking of the catalogue."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.batches import EvaluationSequences, SequenceBatch
from data.config import DataConfig
from data.interactions import Interactions
from data.prompt_rows import PromptSettings
from data.sources import read
from data.splits import Split, split
from launch.methods import Built, Setting, build_bigrec
from models.backbone import BackboneConfig
from models.bigrec import BIGRec, BIGRecConfig
from models.tiny import TinyConfig
from models.title_grounding import GroundingConfig

TINY = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2, heads=2, vocab_size=600))
DENSE = PromptSettings(template="dense", mode="dense", window=8, overlap=2, history_length=6)
RESPONSE = PromptSettings(template="bigrec-notes", mode="response", history_length=4, few_shot=40)


@pytest.fixture(scope="module")
def world() -> tuple[Interactions, Split]:
    """A small generated catalogue: 30 users, 48 items."""
    config = DataConfig(source="sample", sample_users=30, sample_series=8)
    interactions = read(config)
    return interactions, split(interactions, config)


def _build(
    world: tuple[Interactions, Split],
    config: BIGRecConfig,
    cache: Path,
    other: Built | None = None,
    backbone: BackboneConfig = TINY,
) -> Built:
    interactions, parts = world
    return build_bigrec(
        Setting(
            split=parts,
            catalog=interactions.catalog,
            method=config,
            backbone=backbone,
            seed=3,
            cache=cache,
            load_model=lambda path: other,
        )
    )


def _by_hand(model: BIGRec, ids: Tensor, first_label: int) -> float:
    """Cross-entropy of one row by the backbone's own logits, in one piece."""
    logits = model.backbone(input_ids=ids[None]).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[first_label - 1 : -1], ids[first_label:], reduction="sum").item()


@pytest.mark.parametrize("settings", [DENSE, RESPONSE], ids=["dense", "response"])
@pytest.mark.parametrize("on_inputs", [False, True], ids=["titles", "whole text"])
def test_loss_is_the_cross_entropy_of_the_labelled_tokens(world, cache, settings, on_inputs) -> None:
    built = _build(world, BIGRecConfig(prompts=settings, loss_on_inputs=on_inputs), cache)
    built.model.eval()
    examples = built.training()
    indices = np.array([0, 5, 3])
    batch = examples.collate(indices, 0)
    with torch.no_grad():
        loss = built.model(batch)
        expected = 0.0
        count = 0
        for index in indices:
            row = examples.prompts[int(index)]
            ids, first = torch.from_numpy(row["input_ids"]).long(), 1 if on_inputs else int(row["context"])
            expected += _by_hand(built.model, ids, first)
            count += len(ids) - first
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert loss.count == batch.count == count


@pytest.mark.parametrize("objective", ["titles", "items"])
def test_a_start_that_runs_once_gives_the_same_loss_and_gradients(world, cache, objective) -> None:
    found = {}
    for share in (False, True):
        config = BIGRecConfig(objective=objective, prompts=RESPONSE, share_start=share)
        built = _build(world, config, cache)
        model, batch = built.model.double(), built.training().collate(np.array([0, 5, 3, 11]), 0)
        read = []
        embed = model.backbone.get_input_embeddings()
        embed.register_forward_hook(lambda _, inputs, __, read=read: read.append(inputs[0].numel()))
        loss = model(batch)
        loss.total.backward()
        assert batch.shared > 20, "the instruction"
        assert sum(read) == batch.input_ids.numel() - share * 3 * batch.shared
        found[share] = [loss.total.detach(), *(p.grad for p in model.parameters())]
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)  # angles are float32


@pytest.mark.parametrize(
    ("config", "backbone"),
    [
        (BIGRecConfig(prompts=DENSE), TINY),
        (BIGRecConfig(prompts=RESPONSE, loss_on_inputs=True), TINY),
        (BIGRecConfig(prompts=RESPONSE), replace(TINY, gradient_checkpointing=True)),
    ],
    ids=["dense", "labels in the prompt", "no keys and values"],
)
def test_where_a_start_cannot_run_once_it_does_not(world, cache, config, backbone) -> None:
    built = _build(world, replace(config, share_start=True), cache, backbone=backbone)
    assert built.training().collate(np.arange(2), 0).shared == 0


def test_dense_rows_name_every_next_title_once_an_epoch(world, cache) -> None:
    _, parts = world
    built = _build(world, BIGRecConfig(objective="items", prompts=DENSE), cache)
    examples = built.training()
    batch = examples.collate(np.arange(len(examples.lengths)), 0)
    expected = np.concatenate([parts.training_items(user)[1:] for user in range(parts.num_users)])
    assert batch.count == len(expected)
    assert sorted(batch.targets.tolist()) == sorted(expected.tolist())


def test_muted_batch_adds_nothing(world, cache) -> None:
    built = _build(world, BIGRecConfig(prompts=DENSE), cache)
    loss = built.model(built.training().collate(np.arange(3), 0).muted())
    loss.total.backward()
    assert loss.total.item() == 0
    assert loss.count == 0
    assert all(p.grad is None or not p.grad.any() for p in built.model.parameters())


@pytest.mark.parametrize("scoring", ["likelihood", "constrained", "beam", "generate"])
def test_every_scoring_ranks_the_catalogue(world, cache, scoring) -> None:
    interactions, parts = world
    config = BIGRecConfig(prompts=DENSE, scoring=scoring, num_beams=5, grounding=GroundingConfig(max_new_tokens=8))
    built = _build(world, config, cache)
    built.model.eval()
    rows = built.evaluation(parts, "test")
    with torch.inference_mode():
        together = built.model(rows.collate(np.arange(6), 0))
        alone = built.model(rows.collate(np.array([4]), 0))
    assert together.shape == (6, interactions.catalog.num_items + 1)
    assert together.dtype == torch.float32
    assert (together[:, 0] == -torch.inf).all()
    assert torch.isfinite(together[:, 1:]).all()
    torch.testing.assert_close(together[4], alone[0], rtol=1e-4, atol=1e-4)


def test_constrained_probabilities_add_up_to_one(world, cache) -> None:
    built = _build(world, BIGRecConfig(prompts=DENSE), cache)
    built.model.eval()
    with torch.inference_mode():
        scores = built.model(built.evaluation(world[1], "valid").collate(np.arange(4), 0))
    torch.testing.assert_close(scores[:, 1:].exp().sum(dim=1), torch.ones(4), rtol=1e-4, atol=1e-4)


def test_item_objective_learns_and_scores_by_dot_product(world, cache) -> None:
    built = _build(world, BIGRecConfig(objective="items", prompts=DENSE), cache)
    batch = built.training().collate(np.arange(16), 0)
    optimizer = torch.optim.AdamW(built.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = built.model(batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.item() / loss.count)
    assert losses[-1] < min(losses[0] - 1, np.log(48))  # better than a uniform guess among 48 items
    built.model.eval()
    with torch.inference_mode():
        scores = built.model(built.evaluation(world[1], "test").collate(np.arange(3), 0))
    assert scores.shape == (3, 49)


def test_titles_cannot_be_scored_by_a_model_of_items(world, cache) -> None:
    with pytest.raises(ValueError, match=r"--method\.scoring likelihood does not fit --method\.objective items"):
        _build(world, BIGRecConfig(objective="items", scoring="likelihood", prompts=DENSE), cache)


def test_gamma_is_chosen_on_validation_and_saved(world, cache) -> None:
    _, parts = world
    config = BIGRecConfig(
        prompts=DENSE, scoring="generate", grounding=GroundingConfig(max_new_tokens=8, injection="popularity")
    )
    built = _build(world, config, cache)
    rows = built.evaluation(parts, "valid")
    batches = [rows.collate(np.arange(len(rows.lengths)), 0)]
    assert built.calibrate is not None
    built.calibrate(built.model, batches, parts.target_items("valid"))
    model = built.model
    assert "grounding.gamma" in model.saved_buffers

    def ndcg(gamma: float) -> float:
        model.grounding.gamma.fill_(gamma)
        with torch.inference_mode():
            scores = model(batches[0])[:, 1:]
        target = torch.from_numpy(parts.target_items("valid")) - 1
        rank = (scores > scores.gather(1, target[:, None])).sum(dim=1).double()
        return sum(((rank < k) / torch.log2(rank + 2)).mean().item() for k in (1, 5, 10, 20))

    chosen = model.grounding.gamma.item()
    assert ndcg(chosen) >= max(ndcg(0.0), ndcg(5.0), ndcg(50.0)) - 1e-9


def test_collaborative_injection_bends_towards_the_other_model(world, cache) -> None:
    _, parts = world

    class Other(torch.nn.Module):
        """Likes items 1, 2, 3 ... in this order."""

        def scores(self, batch: SequenceBatch) -> Tensor:
            liked = torch.arange(49.0).flip(0).repeat(len(batch.row), 1)
            liked[:, 0] = -torch.inf
            return liked

    grounding = GroundingConfig(
        max_new_tokens=8, match="none", injection="collaborative", collaborative_run=Path("run"), gamma=0.0
    )
    histories = EvaluationSequences(parts, "test", 10)
    config = BIGRecConfig(prompts=DENSE, scoring="generate", grounding=grounding)
    other = Built(Other(), training=lambda: histories, evaluation=lambda split, phase: histories)
    built = _build(world, config, cache, other)
    built.model.eval()
    batch = built.evaluation(parts, "test").collate(np.arange(4), 0)

    def top_items(gamma: float) -> Tensor:
        built.model.grounding.gamma.fill_(gamma)
        with torch.inference_mode():
            return built.model(batch)[:, 1:].argsort(dim=1, descending=True)[:, :7] + 1

    by_distance, bent = top_items(0.0), top_items(99.0)
    assert torch.equal(by_distance[:, 0], bent[:, 0])  # the nearest title stays first, whatever gamma says
    assert bent[:, 1:].float().mean() < 10 < by_distance[:, 1:].float().mean()


def test_injection_needs_its_run() -> None:
    with pytest.raises(ValueError, match=r"--method\.grounding\.collaborative_run None"):
        GroundingConfig(injection="collaborative")
