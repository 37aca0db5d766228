"""The stages of LLM2Vec as runs: each learns, is exported, and the next one starts from what was learned."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from launch import evaluate, export, recommend, train
from launch.loading import load_run
from models.backbone import causal_model, is_causal
from tests.conftest import forget_accelerator

DATA = "--data.source sample --data.sample_users 60 --data.sample_series 40".split()
SHAPE = "--backbone.tiny.hidden_size 32 --backbone.tiny.layers 2 --backbone.tiny.heads 2".split()
TRAIN = "--train.trackers [] --train.precision fp32 --train.batch_size 16".split()
FLAGS = [*DATA, *TRAIN, "--method.texts.max_history=10"]


def trained(model: str, folder: Path, *flags: str) -> Path:
    forget_accelerator()
    assert train.main(["--model", model, *FLAGS, *flags, f"--output={folder}"]) == 0
    return folder


def exported(run: Path, *flags: str) -> Path:
    folder = run.with_name(f"{run.name}-exported")
    assert export.main([f"--run={run}", f"--to={folder}", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def mntp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mntp"
    return trained("mntp", folder, *SHAPE, "--train.lr=1e-2", "--train.epochs=8", "--train.eval_every_epochs=2")


@pytest.fixture(scope="module")
def bidirectional(mntp: Path) -> Path:
    return exported(mntp)


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_mntp_learns_and_keeps_its_best_weights(mntp: Path, capsys) -> None:
    lines = [json.loads(line) for line in (mntp / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "valid/loss" in line]
    assert len(validations) == 4
    best = min(validations, key=lambda line: line["valid/loss"])
    found = results(mntp)
    assert found["valid"]["loss"] == pytest.approx(best["valid/loss"], abs=1e-5)
    assert found["training"]["best_step"] == best["step"]
    # Guessing the most frequent tokens has an accuracy of .11 and a loss of 4.7 here.
    assert found["valid"]["accuracy"] > 0.2
    assert found["valid"]["loss"] < 3.7
    assert "test" not in found
    trained("mntp", mntp, *SHAPE, "--train.lr=1e-2", "--train.epochs=8", "--train.eval_every_epochs=2")
    shown = capsys.readouterr().out
    assert f"{found['valid']['loss']:.4f}" in shown
    assert f"{found['valid']['accuracy']:.4f}" in shown


def test_a_stage_ranks_nothing_and_says_what_to_do(mntp: Path) -> None:
    for command, flags in ((evaluate.main, []), (recommend.main, ["--user", "1"])):
        with pytest.raises(SystemExit, match=r"it is a stage.*launch/export\.py"):
            command([f"--run={mntp}", *flags])
    with pytest.raises(SystemExit, match=r"--train\.metric NDCG@10: mntp ranks nothing"):
        train.main(["--model", "mntp", "--train.metric", "NDCG@10"])
    with pytest.raises(SystemExit, match=rf"{mntp} is a run folder: write its backbone out"):
        train.main(["--model", "e4srec", *FLAGS[:-1], f"--backbone.name={mntp}", f"--output={mntp}-next"])
    with pytest.raises(SystemExit, match=r"--backbone\.causal true hides"):
        train.main(["--model", "mntp", *FLAGS, "--backbone.causal=true", f"--output={mntp}-causal"])


def test_an_export_is_the_model_that_was_trained(mntp: Path, bidirectional: Path) -> None:
    run = load_run(mntp)
    tokenizer = AutoTokenizer.from_pretrained(bidirectional)
    assert tokenizer.get_vocab() == run.built.tokenizer.get_vocab()
    text = "user history: Hollow Lantern (1990); <eos>"
    assert tokenizer(text)["input_ids"] == run.built.tokenizer(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(bidirectional).eval()
    assert model.config.is_causal is False
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, run.built.model.backbone(ids).logits)
    with pytest.raises(SystemExit, match="is there already"):
        export.main([f"--run={mntp}", f"--to={bidirectional}"])


def test_each_stage_starts_from_the_one_before(bidirectional: Path, tmp_path: Path) -> None:
    """mntp -> simcse with LoRA -> dense retrieval; what was trained is in what comes next, the adapter merged."""
    flags = [f"--backbone.name={bidirectional}", "--train.lr=1e-2", "--train.max_steps=4"]
    simcse = trained("simcse", tmp_path / "simcse", *flags)
    assert 0 < results(simcse)["valid"]["loss"] < 5
    run = load_run(simcse)
    peft = run.built.model.encoder.backbone
    assert not is_causal(peft), "the direction came with the folder"
    ids = torch.arange(3, 20)[None]
    before = AutoModel.from_pretrained(bidirectional).eval()
    folder = exported(simcse)
    merged = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = causal_model(peft.eval())(ids).last_hidden_state
        torch.testing.assert_close(merged(ids).last_hidden_state, wanted, atol=1e-5, rtol=1e-4)
        assert (before(ids).last_hidden_state - wanted).abs().max() > 1e-2, "the adapter has learned something"
    assert merged.config.attention_dropout == 0, "the dropout was the stage's"
    dense = trained("dense-retrieval", tmp_path / "dense", f"--backbone.name={folder}", "--train.max_steps=2")
    assert not is_causal(load_run(dense).built.model.user_encoder.backbone)
    with pytest.raises(SystemExit, match=r"writes text: pass --backbone\.causal true"):
        forget_accelerator()
        train.main(["--model", "bigrec", *DATA, f"--backbone.name={bidirectional}", f"--output={tmp_path / 'bigrec'}"])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_an_adapter_is_merged_into_the_weights_as_they_were_published(backbone_root, tmp_path, quantization) -> None:
    base = backbone_root / "stories260k"
    flags = [f"--backbone.name={base}", f"--backbone.quantization={quantization}", "--train.max_steps=2"]
    run = trained("mntp", tmp_path / "run", *flags, "--train.lr=1e-2", "--backbone.lora_targets=[q_proj]")
    folder = exported(run, "--dtype=float32")
    ours, published = (dict(AutoModelForCausalLM.from_pretrained(each).named_parameters()) for each in (folder, base))
    saved = load_run(run, full_precision=True).built.model.backbone.state_dict()
    for name, weight in published.items():
        change = ours[name] - weight.float()
        if "q_proj" not in name:
            assert not change.any(), name
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (saved[f"{stem}.lora_{matrix}.default.weight"] for matrix in "AB")
        assert b.any()
        torch.testing.assert_close(change, 2 * b @ a, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_what_cannot_be_one_backbone_is_refused(backbone_root, tmp_path) -> None:
    sasrec = trained_without_texts("sasrec", tmp_path / "sasrec", "--method.window=8", "--method.hidden_size=16")
    with pytest.raises(SystemExit, match="a model of sasrec holds 0 backbones"):
        export.main([f"--run={sasrec}", f"--to={tmp_path / 'to'}"])
    mixed = [f"--backbone.name={backbone_root / 'stories260k'}", "--backbone.adapter=moe-lora"]
    reads = [f"--method.sasrec={sasrec}", "--method.prompts.max_history=8"]
    ilora = trained_without_texts("ilora-items", tmp_path / "ilora", *reads, *mixed)
    with pytest.raises(SystemExit, match=r"moe-lora.*cannot be merged"):
        export.main([f"--run={ilora}", f"--to={tmp_path / 'to'}"])


def trained_without_texts(model: str, folder: Path, *flags: str) -> Path:
    forget_accelerator()
    assert train.main(["--model", model, *DATA, *TRAIN, *flags, "--train.max_steps=1", f"--output={folder}"]) == 0
    return folder
