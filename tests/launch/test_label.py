"""A reranker as a teacher: labels that are gone on with, learned from by another run, and never of the future."""

import json
import math
import shutil
from pathlib import Path

import pytest
from accelerate import PartialState

from data.splits import Split
from launch import label, train
from launch.loading import load_run, read_data_of
from tests.conftest import forget_accelerator
from tests.launch.conftest import FLAGS

DATA = FLAGS[2 : FLAGS.index("--method.window")]
RERANKER = (
    "--backbone.tiny.hidden_size 32 --backbone.tiny.layers 1 --train.trackers [] --train.precision fp32 "
    "--train.batch_size 16 --train.eval_batch_size 32 --train.lr 0.003 --method.prompts.history_length 4"
).split()
SETTINGS = {
    "rankllm": "--method.num_candidates 6 --method.window 4 --method.stride 2".split(),
    "llamarec": "--method.prompts.num_candidates 6".split(),
}


def train_reranker(model: str, retriever: Path, folder: Path, *flags: str) -> Path:
    forget_accelerator()
    settings = [*DATA, *RERANKER, *SETTINGS[model], f"--method.retriever={retriever}", f"--output={folder}"]
    assert train.main([f"--model={model}", *settings, *flags]) == 0
    forget_accelerator()
    return folder


def write_labels(run: Path, output: Path, *flags: str) -> list[dict]:
    forget_accelerator()
    assert label.main([f"--run={run}", f"--output={output}", *flags]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module", params=["rankllm", "llamarec"])
def teacher(request: pytest.FixtureRequest, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is not trained: its orders are its own, and that is all these tests need."""
    folder = tmp_path_factory.mktemp("teacher") / request.param
    return train_reranker(request.param, trained, folder, "--train.max_steps=0")


@pytest.fixture(scope="module")
def parts(trained: Path) -> Split:
    return read_data_of(load_run(trained))


def test_a_run_of_no_steps_is_measured_as_it_is(teacher: Path) -> None:
    results = json.loads((teacher / "results.json").read_text())
    assert results["training"]["steps"] == 0
    found = results["two_stages"]["test"]
    assert found["subset"]["HR@5"] * found["recall"] == pytest.approx(results["test"]["HR@5"])
    assert found["candidates"] == 6
    if teacher.name == "rankllm":
        scoring = results["test"]["header"]["scoring"]
        assert scoring["windows_per_user"] == 2 == scoring["calls_per_user"]  # six candidates, windows of four
        assert set(scoring["answers"]) == {"ok"}


def test_a_loaded_reranker_leaves_joining_the_launch_to_the_runtime(teacher: Path) -> None:
    """Whoever asks Accelerate for a device before the Runtime is made joins as one process alone."""
    load_run(teacher)
    assert not PartialState._shared_state


def test_labels_are_the_order_of_the_catalogue_scores(teacher: Path, tmp_path: Path, parts: Split) -> None:
    lines = write_labels(teacher, tmp_path / "valid.jsonl", "--phase=valid")
    assert {line["user"] for line in lines} == set(parts.raw_users)
    run = load_run(teacher)
    built = run.built
    built.model.eval()
    examples = built.require_full_ranking()(parts, "valid")
    row_of = {parts.raw_users[user]: row for row, user in enumerate(parts.valid.user)}
    for line in lines[:5]:
        scores = built.model(examples.collate([row_of[line["user"]]]))[0].detach()  # type: ignore[arg-type]
        items = [run.catalog.raw_ids.index(raw) for raw in line["candidates"]]
        order = sorted(range(6), key=lambda place: -float(scores[items[place]]))
        assert [line["ranks"][place] for place in order] == [1, 2, 3, 4, 5, 6]
        assert scores.isfinite().sum() == 6
    audit = json.loads((tmp_path / "valid.jsonl.audit.json").read_text())
    results = json.loads((teacher / "results.json").read_text())
    targets = dict(zip(parts.raw_users, (run.catalog.raw_ids[i] for i in parts.target_items("valid")), strict=True))
    found = [line for line in lines if targets[line["user"]] in line["candidates"]]
    gains = [1 / math.log2(1 + line["ranks"][line["candidates"].index(targets[line["user"]])]) for line in found]
    assert audit["teacher NDCG@10"] == pytest.approx(sum(gains) / len(lines))
    assert audit["next item among them"] == pytest.approx(results["two_stages"]["valid"]["recall"])


def test_training_labels_go_on_where_they_stopped_and_hold_nothing_of_the_future(
    teacher: Path, tmp_path: Path, parts: Split
) -> None:
    file = tmp_path / "train.jsonl"
    lines = write_labels(teacher, file, "--cuts=3", "--add_target=true")
    number = {raw: user for user, raw in enumerate(parts.raw_users)}
    raw_ids = load_run(teacher).catalog.raw_ids
    for line in lines:
        user = number[line["user"]]
        assert parts.train_end[user] - 3 <= line["cut"] < parts.train_end[user]
        assert raw_ids[parts.history(user, line["cut"] + 1)[-1]] in line["candidates"]
    assert len({(line["user"], line["cut"]) for line in lines}) == len(lines) == 3 * parts.num_users
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = write_labels(teacher, file, "--cuts=3", "--add_target=true")
    assert file.read_bytes().startswith(whole[: len(whole) // 2])

    def judged(lines: list[dict]) -> dict:
        return {(line["user"], line["cut"]): (line["candidates"], line["ranks"]) for line in lines}

    assert judged(again) == judged(lines)
    assert write_labels(teacher, file, "--cuts=3", "--add_target=true") == again  # nothing left to do
    with pytest.raises(SystemExit, match="no teacher is handed a held-out item"):
        write_labels(teacher, tmp_path / "x.jsonl", "--phase=valid", "--add_target=true")


def test_rankllm_learns_a_teachers_order(trained: Path, teacher: Path, tmp_path: Path, parts: Split) -> None:
    file = tmp_path / "train.jsonl"
    write_labels(teacher, file, "--cuts=3")
    flags = [f"--method.labels={file}", "--train.max_steps=2", "--method.objective=ranknet"]
    with pytest.raises(SystemExit, match=r"6 candidates.*--method\.window 6"):
        train_reranker("rankllm", trained, tmp_path / "narrow", *flags)
    flags.append("--method.window=6")
    student = train_reranker("rankllm", trained, tmp_path / "student", *flags)
    assert json.loads((student / "results.json").read_text())["training"]["steps"] == 2
    held_out = tmp_path / "valid.jsonl"
    write_labels(teacher, held_out, "--phase=valid")
    shutil.rmtree(student)
    with pytest.raises(SystemExit, match="expected phase train of split"):
        train_reranker("rankllm", trained, student, *flags, f"--method.labels={held_out}")


def test_a_model_that_ranks_no_candidates_is_no_teacher(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a run of sasrec: expected a reranker"):
        write_labels(trained, tmp_path / "labels.jsonl")


def test_a_model_that_writes_no_permutations_stops_with_the_flag(trained: Path, tmp_path: Path) -> None:
    flags = ["--train.max_steps=0", "--method.mode=generate", "--method.max_new_tokens=4"]
    with pytest.raises(SystemExit, match=r"wrong_format.*--method\.max_failures"):
        train_reranker("rankllm", trained, tmp_path / "run", *flags)
