"""LlamaRec as real runs: from a retriever to figures of both stages, measured again, resumed, spread, and refused."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.processes import run, start, start_ranks
from tests.runs import losses, results

pytestmark = pytest.mark.slow
COMMON = (
    "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.precision fp32 --train.trackers [] "
    "--train.batch_size 16 --train.log_every_steps 1"
).split()
SASREC = ["--model", "sasrec", *COMMON, "--method.window", "12", "--method.hidden_size", "16", "--train.lr", "0.01"]
SMALL = (
    "--model llamarec --train.lr 0.003 --train.max_steps 6 --method.cuts 2 --method.prompts.num_candidates 8 "
    "--method.prompts.history_length 5 --backbone.tiny.hidden_size 32 --backbone.tiny.layers 1"
).split()


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sasrec"
    trained = run(*SASREC, "--train.epochs=5", output=folder)
    assert trained.process.exitcode == 0, trained.text()
    return folder


def ranker(retriever: Path, cache: Path, *flags: str) -> list[str]:
    return [*SMALL, *COMMON, f"--method.retriever={retriever}", f"--data.cache={cache}", *flags]


def test_figures_of_both_stages(tmp_path: Path, retriever: Path, cache: Path) -> None:
    output = tmp_path / "llamarec"
    trained = run(*ranker(retriever, cache, "--method.permutations=2", "--method.negatives=hard"), output=output)
    assert trained.process.exitcode == 0, trained.text()
    found, alone = results(output), results(retriever)
    for phase in ("valid", "test"):
        stages, overall = found["two_stages"][phase], found[phase]
        assert 0.2 < stages["recall"] < 1
        assert stages["candidates"] == 8
        for name, value in stages["retriever"].items():
            assert value == pytest.approx(alone[phase][name]), "the retriever's own, exactly"
            assert overall[name] == pytest.approx(stages["recall"] * stages["subset"][name])
            assert value == pytest.approx(stages["recall"] * stages["retriever_subset"][name])
    stages = found["two_stages"]["valid"]
    assert stages["subset"]["NDCG@5"] > 0
    assert 0 <= stages["llm_weight"] <= 1
    assert f"retrieved: {found['two_stages']['test']['recall']:.4f} of the targets" in trained.text()
    assert f"{found['two_stages']['valid']['recall']:.4f} of validation" in trained.text()
    assert len(list((cache / "candidates").glob("*.npz"))) == 3, "validation, test and training, each asked for once"

    again = start(output=output, script="evaluate")
    assert again.wait() == 0, again.text()
    measured = json.loads(next((output / "evaluations").glob("*.json")).read_text())
    assert measured["NDCG@10"] == pytest.approx(found["test"]["NDCG@10"], abs=1e-6), (
        "the weight that was chosen is kept"
    )
    for part in ("subset", "retriever", "retriever_subset"):
        assert measured["two_stages"][part] == pytest.approx(found["two_stages"]["test"][part], abs=1e-6)
    assert f"retrieved: {measured['two_stages']['recall']:.4f} of the targets" in again.text()
    offered = start("--protocol=candidates-20", output=output, script="evaluate")
    assert offered.wait() != 0
    assert "8 identifiers" in offered.text()


def test_fusion_with_the_chosen_weight_is_no_worse_on_validation(tmp_path: Path, retriever: Path, cache: Path) -> None:
    trained = run(
        *ranker(retriever, cache, "--evaluation.cutoffs=[5,8]", "--train.metric=NDCG@8"), output=tmp_path / "run"
    )
    assert trained.process.exitcode == 0, trained.text()
    stages = results(tmp_path / "run")["two_stages"]["valid"]
    assert stages["subset"]["NDCG@8"] >= stages["retriever_subset"]["NDCG@8"] - 1e-9


@pytest.mark.parametrize(
    "flags",
    [
        ["--method.identifiers=vectors", "--method.prompts.num_candidates=28"],
        ["--method.scoring=dot", "--method.item_vectors=retriever", "--backbone.causal=false"],
        ["--method.objective=published", "--method.verbalizer=published", "--method.prompts.truncation=left"],
    ],
    ids=["vectors", "dot", "published"],
)
def test_other_ways_train_and_load(tmp_path: Path, retriever: Path, cache: Path, flags: list[str]) -> None:
    output = tmp_path / "run"
    trained = run(*ranker(retriever, cache, *flags), output=output)
    assert trained.process.exitcode == 0, trained.text()
    again = start(output=output, script="evaluate")
    assert again.wait() == 0, again.text()
    measured = json.loads(next((output / "evaluations").glob("*.json")).read_text())
    assert measured["NDCG@10"] == pytest.approx(results(output)["test"]["NDCG@10"], abs=1e-6)


def test_two_processes_rank_and_resume_like_one(tmp_path: Path, retriever: Path, cache: Path) -> None:
    flags = ranker(retriever, cache, "--method.negatives=hard", "--train.micro_batch_size=4")
    one = run(*flags, output=tmp_path / "one")
    assert one.process.exitcode == 0, one.text()
    for steps in (3, 6):
        flags = ranker(retriever, tmp_path / "other", "--method.negatives=hard", "--train.micro_batch_size=4")
        ranks = start_ranks(*flags, f"--train.max_steps={steps}", output=tmp_path / "two")
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text() + ranks[1].text()
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    assert (
        results(tmp_path / "two")["two_stages"]["test"]["recall"]
        == results(tmp_path / "one")["two_stages"]["test"]["recall"]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "pass --method.retriever"),
        ("--method.retriever={tmp}/none", "--method.retriever names {tmp}/none"),
        ("--method.retriever={retriever} --data.sample_seed=1", "was trained on split"),
        ("--method.retriever={retriever} --method.prompts.num_candidates=119", "--method.prompts.num_candidates 119"),
        (
            "--method.retriever={retriever} --method.prompts.num_candidates=30 --method.identifiers=letters",
            "26 letters",
        ),
        ("--method.retriever={retriever} --method.prompts.max_length=80", "--method.prompts.max_length 80"),
    ],
)
def test_what_does_not_go_together_ends_the_run_with_the_flag(
    tmp_path: Path, retriever: Path, cache: Path, flags: str, message: str
) -> None:
    folders = {"retriever": retriever, "tmp": tmp_path}
    given = [*SMALL, *COMMON, f"--data.cache={cache}", *flags.format(**folders).split()]
    failed = run(*given, output=tmp_path / "run")
    assert failed.process.exitcode != 0
    assert message.format(**folders) in failed.text()
    assert "Traceback" not in failed.text()


def test_a_retriever_that_has_moved_is_named(tmp_path: Path, retriever: Path, cache: Path) -> None:
    own = Path(shutil.copytree(retriever, tmp_path / "own"))
    trained = run(*ranker(own, cache, "--train.max_steps=1"), output=tmp_path / "run")
    assert trained.process.exitcode == 0, trained.text()
    own.rename(tmp_path / "elsewhere")
    again = start(output=tmp_path / "run", script="evaluate")
    assert again.wait() != 0
    assert f"--method.retriever of {tmp_path / 'run'} names {own}" in again.text()
    assert "Traceback" not in again.text()
