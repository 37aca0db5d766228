"""What launch/label.py writes of any run that ranks the catalogue, and students that learn from it alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.processes import start_ranks
from data.candidate_store import CandidateStore, as_test, training_cuts
from data.splits import Split, Targets
from data.teacher_lists import TeacherFolder
from launch import label, train
from launch.candidates import Retriever
from launch.loading import load_model, load_run, read_data_of
from launch.setting import Setting
from launch.teaching import WINDOWS_ANSWER
from tests.conftest import forget_accelerator
from tests.launch.conftest import FLAGS as TRAINED
from tests.launch.test_distillation import distil, refused

K = 7


@pytest.fixture(scope="module")
def parts(trained: Path) -> Split:
    return read_data_of(load_run(trained))


@pytest.fixture(scope="module")
def asked(trained: Path, parts: Split, tmp_path_factory: pytest.TempPathFactory) -> CandidateStore:
    catalog, cache = load_run(trained).catalog, tmp_path_factory.mktemp("cache")
    return Retriever(trained, Setting(parts, catalog, None, None, 0, cache, load_model)).ask(parts, "train", K)


def write(run: Path, output: Path, *flags: str) -> Path:
    forget_accelerator()
    assert label.main([f"--run={run}", f"--output={output}", f"--k={K}", *flags]) == 0
    return output


def read(folder: Path, trained: Path, parts: Split) -> tuple[np.ndarray, CandidateStore]:
    return TeacherFolder(folder, parts, load_run(trained).catalog).read(K)


def test_lists_are_what_the_run_ranks_highest(
    trained: Path, parts: Split, asked: CandidateStore, tmp_path: Path
) -> None:
    folder = write(trained, tmp_path / "teacher", "--lists_at_once=13")
    rows, store = read(folder, trained, parts)
    assert np.array_equal(np.sort(rows), np.arange(len(asked.items)))
    assert np.array_equal(store.items, asked.items[rows])
    np.testing.assert_allclose(store.scores, asked.scores[rows], atol=1e-5)
    files = sorted((folder / "lists").iterdir())
    assert len(files) == -(-len(rows) // (13 * WINDOWS_ANSWER))
    first = parquet.read_table(files[0]).slice(0, 1).to_pylist()[0]
    cuts, raw_ids = training_cuts(parts), load_run(trained).catalog.raw_ids
    assert first["user"] == parts.raw_users[cuts.user[0]]
    assert first["cut"] == cuts.position[0]
    assert first["items"] == [raw_ids[item] for item in asked.items[0]]
    assert sum(first["confidence"]) == pytest.approx(1)
    manifest = json.loads((folder / "teacher.json").read_text())
    assert manifest["rows"] == len(rows)
    assert (manifest["split"], manifest["model"], manifest["k"]) == (parts.hash, "sasrec", K)
    vectors = load_file(folder / "items.safetensors")["item_vectors"]
    assert torch.equal(vectors[1:], load_file(trained / "model" / "model.safetensors")["item_embedding.weight"][1:])


def test_what_stopped_goes_on_and_another_run_does_not(
    trained: Path, parts: Split, asked: CandidateStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(trained, tmp_path / "teacher", "--lists_at_once=10")
    lists = sorted((folder / "lists").iterdir())
    kept = {path.name: path.read_bytes() for path in lists[1:]}
    lists[0].unlink()
    manifest = folder / "teacher.json"
    manifest.write_text(manifest.read_text().replace(f'"rows": {len(asked.items)}', '"rows": null'))
    assert "is not finished" in refused(f"--method.teacher={folder}", f"--output={tmp_path / 'early'}")
    capsys.readouterr()
    write(trained, folder, "--lists_at_once=9")
    assert "160 of 160 lists" in capsys.readouterr().out
    assert {name: (folder / "lists" / name).read_bytes() for name in kept} == kept
    rows, store = read(folder, trained, parts)
    assert np.array_equal(np.sort(rows), np.arange(len(asked.items)))
    assert np.array_equal(store.items, asked.items[rows])
    with pytest.raises(SystemExit, match="name another folder"):
        write(trained, folder, "--cuts=3")
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write(trained, folder)  # nothing is left to do
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole
    sorted((folder / "lists").iterdir())[0].unlink()
    with pytest.raises(ValueError, match="bring the missing files"):
        read(folder, trained, parts)


def test_the_same_split_of_other_events_is_refused(trained: Path, parts: Split, tmp_path: Path) -> None:
    """The hash of a split names users and their test items, and `cut` counts all events."""
    folder = write(trained, tmp_path / "teacher")
    items = parts.items.copy()
    items[0] = items[0] % parts.num_items + 1
    other = replace(parts, items=items)
    with pytest.raises(ValueError, match="both need the same data and split"):
        read(folder, trained, other)


def test_two_processes_write_what_one_writes(
    trained: Path, parts: Split, asked: CandidateStore, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    flags = [f"--run={trained}", f"--k={K}", "--lists_at_once=20"]
    for rank in start_ranks(*flags, output=folder, script="label"):
        assert rank.wait() == 0, rank.text()
    rows, store = read(folder, trained, parts)
    assert np.array_equal(rows, np.arange(len(asked.items)))
    assert np.array_equal(store.items, asked.items)


def test_a_student_learns_the_same_from_the_folder_as_from_the_run(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    folder = write(run, tmp_path / "teacher")
    from_run = distil(run, tmp_path / "from-run")
    shutil.rmtree(run)
    from_folder = distil(folder, tmp_path / "from-folder")
    first, second = (load_file(run / "model" / "model.safetensors") for run in (from_run, from_folder))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "teacher" not in json.loads((from_folder / "results.json").read_text())
    too_many = refused(f"--method.teacher={folder}", f"--output={tmp_path / 'x'}", "--method.teacher_k=8")
    assert "--method.teacher_k 8" in too_many
    forget_accelerator()
    other = refused(f"--method.teacher={folder}", f"--output={tmp_path / 'y'}", "--data.item_core=2")
    assert "both need the same data and split" in other


def test_lists_of_the_last_events_alone(trained: Path, parts: Split, tmp_path: Path) -> None:
    folder = write(trained, tmp_path / "teacher", "--cuts=3")
    rows, _ = read(folder, trained, parts)
    cuts = training_cuts(parts)
    assert (parts.train_end[cuts.user[rows]] - cuts.position[rows] <= 3).all()
    assert len(rows) == np.minimum(np.maximum(parts.train_end - 1, 0), 3).sum()
    student = distil(folder, tmp_path / "student")
    assert json.loads((student / "results.json").read_text())["training"]["steps"] > 0


@pytest.mark.parametrize("model", ["bigrec", "dense-retrieval", "llamarec"])
def test_a_run_with_a_backbone_is_asked_history_by_history(
    model: str, trained: Path, parts: Split, tmp_path: Path
) -> None:
    """Not trained: its order is its own, and a reranker names its retriever's candidates only."""
    data = TRAINED[2 : TRAINED.index("--method.window")]
    flags = [f"--model={model}", *data, "--train.max_steps=0", "--train.trackers=[]", "--train.precision=fp32"]
    flags += ["--backbone.tiny.hidden_size=32", "--backbone.tiny.layers=1", f"--data.cache={tmp_path / 'cache'}"]
    if model == "llamarec":
        flags += [f"--method.retriever={trained}", "--method.prompts.num_candidates=9"]
    forget_accelerator()
    assert train.main([*flags, f"--output={tmp_path / 'run'}"]) == 0
    rows, store = read(write(tmp_path / "run", tmp_path / "teacher", "--cuts=1"), tmp_path / "run", parts)
    cuts, built = training_cuts(parts), load_model(tmp_path / "run")
    some = Targets(cuts.user[rows][:12], cuts.position[rows][:12])
    built.model.eval()
    with torch.no_grad():
        scores = built.model(built.require_full_ranking()(as_test(parts, some), "test").collate(np.arange(12), 0))
        vectors = built.model.catalogue_vectors()
    for row, (user, position) in enumerate(zip(some.user, some.position, strict=True)):
        scores[row, parts.history(int(user), int(position))] = -torch.inf
    np.testing.assert_allclose(store.scores[:12], scores.topk(K).values, atol=1e-4)
    assert (scores.gather(1, torch.from_numpy(store.items[:12].astype(np.int64))) > -torch.inf).all()
    file = tmp_path / "teacher" / "items.safetensors"
    assert file.exists() == (model != "llamarec")
    if vectors is not None:
        torch.testing.assert_close(load_file(file)["item_vectors"][1:], vectors[1:].float())
        assert len(vectors) == parts.num_items + 1
        distil(tmp_path / "teacher", tmp_path / "student")


def test_what_a_folder_does_not_take(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"go with a \.jsonl file"):
        write(trained, tmp_path / "teacher", "--phase=valid")
    with pytest.raises(SystemExit, match=r"--k 500"):
        label.main([f"--run={trained}", f"--output={tmp_path / 'teacher'}", "--k=500"])
    with pytest.raises(SystemExit, match="is a file or a run"):
        write(trained, trained)
    write(trained, tmp_path / "teacher")  # what failed has begun no folder
