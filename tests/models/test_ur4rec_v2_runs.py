"""The stages of UR4Rec V2 as real runs: each begins where the one before ended, and says what its parts do alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.grid_rows import save_small_backbone
from benchmarks.processes import Run, run, start
from launch.loading import load_model
from tests.runs import SMALL, results

DATA = (
    "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.precision fp32 --train.trackers []"
).split()
STAGE = (
    "--method.cuts 4 --method.hidden_size 32 --method.history 8 --method.co_attention true "
    "--train.batch_size 16 --train.epochs 2 --train.lr 0.003"
).split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_small_backbone(folder / "encoder")
    assert run(*SMALL, output=folder / "sasrec").process.exitcode == 0
    return folder


def stage(inputs: Path, name: str, *flags: str) -> Run:
    texts = f"--method.encoder={inputs / 'encoder'}", f"--data.cache={inputs / 'cache'}"
    finished = run("--model=ur4rec-v2", *DATA, *STAGE, *texts, *flags, output=inputs / name)
    assert finished.process.exitcode == 0, finished.text()
    return finished


@pytest.fixture(scope="module")
def retriever(inputs: Path) -> Run:
    return stage(inputs, "retriever", f"--method.sasrec={inputs / 'sasrec'}")


def weights(finished: Run) -> dict[str, torch.Tensor]:
    return load_file(finished.folder / "model" / "model.safetensors")


@pytest.mark.slow
def test_every_result_tells_its_parts_and_is_not_below_them(inputs: Path, retriever: Run) -> None:
    found, sasrec = results(retriever.folder), results(inputs / "sasrec")
    alone = {name: found["parts"][name]["valid"]["NDCG@10"] for name in ("sasrec", "retriever")}
    assert found["valid"]["NDCG@10"] >= max(alone.values()) - 1e-9
    for phase in ("valid", "test"):
        assert found["parts"]["sasrec"][phase]["HR@10"] == pytest.approx(sasrec[phase]["HR@10"], abs=1e-9)
    assert not [name for name in weights(retriever) if name.startswith("sasrec")], "it stays as it is"
    again = start("--protocol=candidates-20", output=retriever.folder, script="evaluate")
    assert again.wait() == 0, again.text()
    measured = json.loads((retriever.folder / "evaluations/test-candidates-20-full-history-expected.json").read_text())
    assert measured["parts"]["retriever"]["candidates-20/HR@10"] > found["parts"]["retriever"]["test"]["HR@10"]


@pytest.mark.slow
def test_a_loaded_run_scores_as_it_did(retriever: Run) -> None:
    again = start(output=retriever.folder, script="evaluate")
    assert again.wait() == 0, again.text()
    measured = json.loads((retriever.folder / "evaluations/test-full-full-history-expected.json").read_text())
    assert measured["NDCG@10"] == pytest.approx(results(retriever.folder)["test"]["NDCG@10"], abs=1e-6)
    saved = weights(retriever)
    assert (saved["memory.until"] > 0).all(), "the end of training brings every user's memory up to date"
    assert saved["memory.state"].abs().sum() > 0


@pytest.mark.slow
def test_a_history_of_nobody_known_gets_recommendations(retriever: Run) -> None:
    catalog = json.loads((retriever.folder / "model" / "catalog.json").read_text())
    asked = start("--history", *catalog["titles"][1:4], output=retriever.folder, script="recommend")
    assert asked.wait() == 0, asked.text()
    assert catalog["titles"][1] not in asked.text().partition("1. ")[2]


@pytest.mark.slow
def test_later_stages_go_on_and_train_what_they_name(inputs: Path, retriever: Run) -> None:
    joint = stage(inputs, "joint", "--method.train=joint", f"--method.init={retriever.folder}", "--train.max_steps=2")
    first, second = load_model(retriever.folder).model, load_model(joint.folder).model
    moved = {
        name: float((p - dict(first.named_parameters())[name]).abs().max()) for name, p in second.named_parameters()
    }
    assert 0 < moved["sasrec.item_embedding.weight"] < 0.1, "two steps from where the stage before ended"
    assert 0 < moved["retriever.proxies.vectors"] < 0.1
    multipliers = '--train.lr_multipliers={"encoder": 0.1}'
    whole = stage(
        *(inputs, "end-to-end", "--method.train=end-to-end", f"--method.init={joint.folder}", multipliers),
        *("--method.encoder_layers=1", "--train.max_steps=2"),
    )
    saved = weights(whole)
    layers = {name.split(".layers.")[1].split(".")[0] for name in saved if name.startswith("encoder")}
    assert layers == {"1"}, "the last of two"
    texts = weights(joint)["item_texts"].float(), saved["item_texts"].float()
    assert texts[0].shape[1] == 2, "sentences of each item's text"
    assert 0 < (texts[0] - texts[1])[1:].abs().max() < 0.5, "the trained encoder's, not another's"
    assert torch.equal(texts[0].any(-1), texts[1].any(-1)), "and nothing where there is no sentence"
    loaded = load_model(whole.folder).model
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, saved[name]), name


@pytest.mark.slow
def test_another_shape_than_the_stage_before_is_refused(inputs: Path, retriever: Run) -> None:
    flags = [
        *DATA,
        "--method.train=joint",
        f"--method.init={retriever.folder}",
        f"--method.encoder={inputs / 'encoder'}",
    ]
    refused = run("--model=ur4rec-v2", *flags, f"--data.cache={inputs / 'cache'}", output=inputs / "refused")
    assert refused.process.exitcode
    assert "--method.init" in refused.text()


@pytest.mark.slow
def test_the_retriever_alone_learns_the_planted_structure(tmp_path: Path, inputs: Path) -> None:
    """Beside a SASRec that has learned nothing; popularity has HR@10 .10."""
    flags = "--data.source sample --train.precision fp32 --train.trackers []".split()
    untrained = run("--model=sasrec", *flags, "--train.max_steps=0", output=tmp_path / "sasrec")
    assert untrained.process.exitcode == 0, untrained.text()
    finished = run(
        *("--model=ur4rec-v2", *flags, f"--method.sasrec={tmp_path / 'sasrec'}", "--method.answers=user"),
        *("--method.cuts=16", "--train.batch_size=32", "--train.epochs=8", "--train.lr=0.003"),
        *(f"--method.encoder={inputs / 'encoder'}", f"--data.cache={tmp_path / 'cache'}", "--method.profile_every=20"),
        output=tmp_path / "run",
    )
    assert finished.process.exitcode == 0, finished.text()
    found = results(finished.folder)
    assert found["parts"]["retriever"]["test"]["HR@10"] > 0.4
    assert found["parts"]["sasrec"]["test"]["HR@10"] < 0.1
    assert found["test"]["HR@10"] >= found["parts"]["retriever"]["test"]["HR@10"] - 0.03
    assert np.isclose(torch.sigmoid(weights(finished)["fusion.shift"]).item(), 0, atol=0.5)
