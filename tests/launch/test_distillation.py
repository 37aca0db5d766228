"""A student trained from a run: compared with it, saved as a plain run, and usable without it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.candidate_store import training_cuts
from evaluation.evaluator import Evaluator
from launch import evaluate, plan, train
from launch.candidates import Retriever
from launch.distillation import compare
from launch.loading import load_model, load_run, read_and_split
from launch.setting import Setting
from tests.conftest import forget_accelerator

FLAGS = (
    "--model dllm2rec-sasrec --data.source sample --data.sample_users 60 --data.sample_series 40 "
    "--method.student.window 12 --method.student.hidden_size 16 --method.student.num_blocks 1 --method.teacher_k 5 "
    "--method.vectors.source teacher --train.trackers [] --train.epochs 2 --train.batch_size 16 --train.lr 0.01 "
    "--train.precision fp32"
).split()


def distil(teacher: Path, output: Path, *flags: str) -> Path:
    where = [f"--method.teacher={teacher}", f"--output={output}", f"--data.cache={output.parent / 'cache'}"]
    assert train.main([*FLAGS, *where, *flags]) == 0
    forget_accelerator()
    return output


def test_a_student_outlives_its_teacher(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = Path(shutil.copytree(trained, tmp_path / "teacher"))
    student = distil(teacher, tmp_path / "student")
    assert "validation NDCG@10: teacher" in capsys.readouterr().out
    results = json.loads((student / "results.json").read_text())
    assert results["model"] == "dllm2rec-sasrec"
    of_teacher = json.loads((teacher / "results.json").read_text())
    assert results["teacher"]["NDCG@10"] == {
        "teacher": pytest.approx(of_teacher["valid"]["NDCG@10"]),
        "student": results["valid"]["NDCG@10"],
    }
    assert 0 < results["teacher"]["overlap@20"] <= 1
    assert results["teacher"]["teacher_better"] + results["teacher"]["student_better"] <= 1

    shutil.rmtree(teacher)
    alone = load_run(student)
    assert alone.config.model == "sasrec"
    assert alone.config.method.hidden_size == 16
    # What serves is as large as a student that never had a teacher.
    plain = load_file(trained / "model" / "model.safetensors")
    served = load_file(student / "model" / "model.safetensors")
    assert {name: t.shape for name, t in served.items()} == {name: t.shape for name, t in plain.items()}
    assert results["parameters"]["total"] == sum(tensor.numel() for tensor in served.values())
    assert evaluate.main([f"--run={student}"]) == 0
    again = json.loads((student / "evaluations" / "test-full-full-history-expected.json").read_text())
    assert again["NDCG@10"] == pytest.approx(results["test"]["NDCG@10"])


def test_lists_know_nothing_of_held_out_events(trained: Path, tmp_path: Path) -> None:
    """The teacher says the same of training histories whatever validation and test targets are."""
    catalog, parts = read_and_split(load_run(trained).config.data)
    held_out = np.concatenate([parts.offsets[t.user] + t.position for t in (parts.valid, parts.test)])
    parts.items.flags.writeable = True
    stores = []
    for turn in range(2):
        setting = Setting(parts, catalog, None, None, 0, tmp_path / str(turn), load_model)
        stores.append(Retriever(trained, setting, "teacher").ask(parts, "train", 5))
        parts.items[held_out] = 1 + parts.items[held_out] % parts.num_items
    assert len(stores[0].items) == len(training_cuts(parts))
    assert np.array_equal(stores[0].items, stores[1].items)
    assert np.array_equal(stores[0].scores, stores[1].scores)


def test_the_comparison_with_a_teacher(trained: Path) -> None:
    run = load_run(trained)
    catalog, parts = read_and_split(run.config.data)
    examples = run.built.require_full_ranking()(parts, "valid")
    batch = examples.collate(np.arange(len(examples.lengths)), 0)
    with torch.no_grad():
        measured = Evaluator(parts, "valid", top_k=4).run(run.built.model, [batch])
    setting = Setting(parts, catalog, None, None, 0, trained, load_model)
    lists = Retriever(trained, setting).ask(parts, "valid", 4)
    greater, equal = measured.ranks.greater.copy(), measured.ranks.equal
    itself = compare(greater, equal, lists, measured)
    assert itself["overlap@4"] == 1
    assert itself["teacher_better"] == itself["student_better"] == 0
    greater[:5] += 1
    greater[5:8] = np.maximum(greater[5:8] - 1, 0)
    lists.items[:, 0] = 0  # no item
    other = compare(greater, equal, lists, measured)
    assert other["overlap@4"] == 0.75
    assert other["student_better"] == pytest.approx(5 / len(greater))
    assert other["teacher_better"] == pytest.approx((measured.ranks.greater[5:8] > 0).sum() / len(greater))


def refused(*flags: str) -> str:
    with pytest.raises(SystemExit) as exit:
        train.main([*FLAGS, *flags])
    return str(exit.value.code)


def test_a_teacher_that_cannot_teach(trained: Path, tmp_path: Path) -> None:
    output = f"--output={tmp_path / 'student'}"
    assert "--method.teacher" in refused(output)
    forget_accelerator()
    assert "--method.teacher" in refused(output, f"--method.teacher={tmp_path}")
    forget_accelerator()
    too_many = refused(output, f"--method.teacher={trained}", "--method.teacher_k=199", "--method.vectors.source=none")
    assert "--method.teacher_k 199" in too_many


def test_a_student_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main("--model dllm2rec-gru4rec --num_items 200 --length 10 --train.batch_size 4".split()) == 0
    assert "what the teacher adds to the loss" in capsys.readouterr().out


def test_what_the_cache_holds_changes_no_weight(trained: Path, tmp_path: Path) -> None:
    """The first run asks the teacher, the second finds its lists."""
    runs = [distil(trained, tmp_path / name, "--train.max_steps=1") for name in ("first", "second")]
    first, second = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
