"""LLaRA and iLoRA as real runs: from a SASRec run to written titles, resumed under a curriculum, and refused."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.grid_rows import save_small_backbone
from benchmarks.processes import run, start
from tests.runs import losses, results

pytestmark = pytest.mark.slow
COMMON = (
    "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.precision fp32 --train.trackers [] "
    "--train.batch_size 16 --train.log_every_steps 1"
).split()
INNER = [*COMMON, "--method.window", "12", "--method.hidden_size", "16", "--train.lr", "0.01"]
SMALL = (
    *COMMON,
    *"--evaluation.protocol candidates-20 --train.lr 0.003 --train.max_steps 6 --method.max_new_tokens 12".split(),
)
TINY = "--backbone.tiny.hidden_size 32 --backbone.tiny.layers 1".split()


@pytest.fixture(scope="module")
def sasrec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sasrec"
    trained = run("--model=sasrec", *INNER, "--train.epochs=3", output=folder)
    assert trained.process.exitcode == 0, trained.text()
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_backbone(tmp_path_factory.mktemp("backbone"))


def evaluated(folder: Path, *flags: str) -> str:
    measured = start("--protocol=candidates-20", *flags, output=folder, script="evaluate")
    assert measured.wait() == 0, measured.text()
    return measured.text()


@pytest.mark.parametrize("scoring", ["likelihood", "generate"])
def test_llara_trains_from_a_sasrec_run_and_is_measured_on_draws(tmp_path: Path, sasrec: Path, scoring: str) -> None:
    output = tmp_path / "llara"
    flags = [*SMALL, *TINY, f"--method.sasrec={sasrec}", f"--method.scoring={scoring}"]
    trained = run("--model=llara", *flags, output=output)
    assert trained.process.exitcode == 0, trained.text()
    found = results(output)
    assert found["header"]["protocol"] == "candidates-20"
    assert "candidates-20/NDCG@10" in found["test"]
    text = evaluated(output, "--draws=2")
    measured = json.loads(next((output / "evaluations").glob("*-2-draws.json")).read_text())
    assert ("written" in measured) == (scoring == "generate") == ("texts, exact rule: " in text)
    if scoring == "generate":
        for rule in ("exact", "published"):
            shares = measured["written"][rule]
            reasons = sum(share for name, share in shares.items() if name.startswith("invalid: "))
            assert shares["ValidRatio"] + reasons == pytest.approx(1)
            assert shares["HR@1 correct/total"] <= shares["ValidRatio"]
    refused = start(output=output, script="evaluate")
    assert refused.wait() != 0
    assert "only ranks the candidates that its prompts offer" in refused.text()
    assert "Traceback" not in refused.text()


def test_ilora_trains_on_a_pre_trained_base_and_names_its_recommender(tmp_path: Path, backbone: Path) -> None:
    own = tmp_path / "own-gru4rec"
    assert run("--model=gru4rec", *INNER, "--train.epochs=1", output=own).wait() == 0
    flags = f"--backbone.name={backbone} --backbone.adapter=moe-lora --method.vectors=states --method.gate.kind=resnet"
    output = tmp_path / "ilora"
    trained = run("--model=ilora", *SMALL, *flags.split(), f"--method.sasrec={own}", output=output)
    assert trained.process.exitcode == 0, trained.text()
    log = losses(output)
    assert sum(log[-1][f"loss/expert_{expert}_use"] for expert in range(4)) == pytest.approx(1, abs=1e-4)
    ours = results(output)["test"]["candidates-20/NDCG@10"]
    assert f"{ours:.4f}" in evaluated(output)
    own.rename(tmp_path / "elsewhere")
    again = start("--protocol=candidates-20", output=output, script="evaluate")
    assert again.wait() != 0
    assert f"--method.sasrec of {output} names {own}" in again.text()
    assert "Traceback" not in again.text()


def test_a_resumed_curriculum_shows_the_prompts_of_a_run_that_was_not_stopped(tmp_path: Path, sasrec: Path) -> None:
    flags = ["--model=llara", *SMALL, *TINY, f"--method.sasrec={sasrec}", "--method.prompts.curriculum=linear"]
    flags += ["--method.prompts.curriculum_epochs=0.05", "--train.eval_every_steps=100"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for output, steps in ((whole, 6), (stopped, 3), (stopped, 6)):
        trained = run(*flags, f"--train.max_steps={steps}", output=output)
        assert trained.process.exitcode == 0, trained.text()
    assert "resuming" in trained.text()
    assert losses(stopped) == losses(whole)
    none = run(*flags, "--method.prompts.curriculum=none", output=tmp_path / "none")
    assert losses(none.folder)[0]["loss"] != losses(whole)[0]["loss"]


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("llara", "--method.sasrec={sasrec} --evaluation.protocol=full", "--evaluation.protocol candidates-20"),
        ("llara", "", "pass --method.sasrec, the run folder of a sasrec, gru4rec or lrurec"),
        ("llara", "--method.sasrec={tmp}/none", "--method.sasrec names {tmp}/none"),
        ("llara", "--method.sasrec={tmp}/none.safetensors", "none.safetensors: there is no such file"),
        ("llara", "--method.sasrec={sasrec} --data.sample_seed=1", "was trained on split"),
        ("llara", "--method.sasrec={sasrec} --method.prompts.history_length=13", "--method.prompts.history_length 12"),
        ("llara", "--method.sasrec={swapped}", "has learned another catalogue"),
        ("ilora", "--method.sasrec={sasrec} --backbone.name={backbone}", "--backbone.adapter moe-lora"),
        ("ilora", "--backbone.name={backbone} --backbone.adapter=moe-lora", "ilora makes its gate of the user's state"),
    ],
)
def test_what_does_not_go_together_ends_the_run_with_the_flag(
    tmp_path: Path, sasrec: Path, backbone: Path, model: str, flags: str, message: str
) -> None:
    folders = {"sasrec": sasrec, "backbone": backbone, "tmp": tmp_path, "swapped": tmp_path / "swapped"}
    catalog = Path(shutil.copytree(sasrec, folders["swapped"])) / "model" / "catalog.json"
    known = json.loads(catalog.read_text())
    known["raw_ids"][1:3] = known["raw_ids"][2:0:-1]
    catalog.write_text(json.dumps(known))
    failed = run(f"--model={model}", *SMALL, *TINY, *flags.format(**folders).split(), output=tmp_path / "run")
    assert failed.process.exitcode != 0
    assert message.format(**folders) in failed.text()
    assert "Traceback" not in failed.text()
