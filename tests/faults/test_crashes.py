"""A run that is killed at any moment and started again ends like one that was never disturbed."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import run, start
from tests.runs import SMALL, At, losses, results, validations


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    finished = run(*SMALL, output=tmp_path_factory.mktemp("undisturbed") / "run")
    assert finished.process.exitcode == 0, finished.text()
    return finished.folder


def assert_same_run(folder: Path, reference: Path) -> None:
    assert losses(folder) == losses(reference)
    assert validations(folder) == validations(reference)
    assert results(folder) == results(reference)
    assert (folder / "model/model.safetensors").read_bytes() == (reference / "model/model.safetensors").read_bytes()


TRAINER, EVALUATOR = "trainers.loop", "evaluation.evaluator"
MOMENTS = {
    "before any checkpoint": At(TRAINER, "Trainer._train_step", 2),
    "in a step, after an odd number of log lines": At(TRAINER, "Trainer._train_step", 5),
    "between a log line and its checkpoint": At("trainers.checkpoint", "Checkpoints.save", 3),
    "between the weights of a checkpoint and its name": At("trainers.checkpoint", "_write_manifest", 4),
    "between a checkpoint and its pointers": At("trainers.checkpoint", "Checkpoints._point", 4),
    "in a validation": At(EVALUATOR, "Evaluator.run", 2),
    "between a validation and its log line": At("trainers.progress", "Progress.record", 2),
    "between a validation's log line and its checkpoint": At(TRAINER, "Trainer._save", 8),
    "between epochs": At("data.loaders", "TrainingLoader.plan", 2),
    "in the evaluation of the test users": At(EVALUATOR, "Evaluator.run", 5),
    "before results are written": At("launch.run_folder", "RunFolder.write_results", 1),
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_killed_and_started_again(undisturbed: Path, tmp_path: Path, moment: At) -> None:
    killed = run(*SMALL, output=tmp_path / "run", before=moment)
    assert killed.process.exitcode == -signal.SIGKILL, f"the moment never came:\n{killed.text()}"
    again = run(*SMALL, output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert_same_run(again.folder, undisturbed)


@pytest.mark.slow
def test_killed_at_twenty_random_steps(undisturbed: Path, tmp_path: Path) -> None:
    """Every one of twenty runs that lost a step to kill -9 ends with the bits of the run that lost none."""
    random = np.random.default_rng()
    for step in random.integers(1, 19, size=20):
        moment = At(TRAINER, "Trainer._train_step", int(step))
        killed = run(*SMALL, output=tmp_path / "run", before=moment)
        assert killed.process.exitcode == -signal.SIGKILL
        again = run(*SMALL, output=tmp_path / "run")
        assert again.process.exitcode == 0, again.text()
        assert_same_run(again.folder, undisturbed)
        shutil.rmtree(tmp_path / "run")


def test_killed_again_and_again_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    random = np.random.default_rng()
    for seconds in random.uniform(0.3, 1.2, size=4):
        started = start(*SMALL, output=tmp_path / "run")
        time.sleep(seconds)
        started.process.kill()
        assert started.wait() in (-signal.SIGKILL, 0)
    last = run(*SMALL, output=tmp_path / "run")
    assert last.process.exitcode == 0, last.text()
    assert_same_run(last.folder, undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(undisturbed: Path, tmp_path: Path, damage: str) -> None:
    killed = run(*SMALL, "--train.keep_checkpoints=3", output=tmp_path / "run", before=At(TRAINER, "Trainer._log", 4))
    assert killed.process.exitcode == -signal.SIGKILL
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content[: 200 if damage == "truncated" else None])
    again = run(*SMALL, "--train.keep_checkpoints=3", output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert f"checkpoint {newest}: model.safetensors differs" in again.text()
    assert "resuming" in again.text()
    assert_same_run(again.folder, undisturbed)


def test_a_checkpoint_that_was_named_is_not_passed_over(tmp_path: Path) -> None:
    killed = run(*SMALL, output=tmp_path / "run", before=At(TRAINER, "Trainer._log", 4))
    newest = sorted((killed.folder / "checkpoints").glob("step-*"))[-1]
    (newest / "optimizer.safetensors").write_bytes(b"")
    again = run(*SMALL, f"--resume={newest}", output=tmp_path / "run")
    assert again.process.exitcode == 1
    assert f"checkpoint {newest}: optimizer.safetensors differs from its checksum" in again.text()


def test_an_older_checkpoint_can_be_gone_back_to(undisturbed: Path, tmp_path: Path) -> None:
    keep = "--train.keep_checkpoints=9"
    killed = run(*SMALL, keep, output=tmp_path / "run", before=At(EVALUATOR, "Evaluator.run", 3))
    assert sorted((killed.folder / "checkpoints").glob("step-*"))[-1].name == "step-00000018"
    again = run(*SMALL, keep, f"--resume={killed.folder}/checkpoints/step-00000004", output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert_same_run(again.folder, undisturbed)


def test_a_best_checkpoint_that_is_gone_is_looked_for_anew(tmp_path: Path) -> None:
    """HR@10 is .594, .583 and .594 again: the first validation, after step 6, has the best checkpoint."""
    settings = [*SMALL, "--train.metric=HR@10"]
    killed = run(*settings, output=tmp_path / "run", before=At(TRAINER, "Trainer._train_step", 10))
    assert (killed.folder / "checkpoints/BEST").read_text() == "step-00000006\n"
    shutil.rmtree(killed.folder / "checkpoints/step-00000006")
    again = run(*settings, output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert results(again.folder)["training"]["best_step"] == 18
    assert (killed.folder / "checkpoints/BEST").read_text() == "step-00000018\n"


def test_never_resuming_starts_afresh_in_the_same_folder(undisturbed: Path, tmp_path: Path) -> None:
    """Checkpoints and log lines of the run before are gone from the first moment, its results too."""
    first = run(*SMALL, "--train.seed=1", "--train.epochs=5", output=tmp_path / "run")
    assert first.process.exitcode == 0
    killed = run(*SMALL, "--resume=never", output=tmp_path / "run", before=At(TRAINER, "Trainer._train_step", 8))
    assert killed.process.exitcode == -signal.SIGKILL
    assert not (killed.folder / "results.json").exists()
    again = run(*SMALL, output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert "resuming" in again.text()
    assert_same_run(again.folder, undisturbed)


def test_a_run_can_be_prolonged(undisturbed: Path, tmp_path: Path) -> None:
    """A finished run with a constant rate, asked for more epochs, ends like one that trained them at once."""
    settings = [*SMALL, "--train.schedule=constant"]
    short = run(*settings, "--train.epochs=1", output=tmp_path / "run")
    assert short.process.exitcode == 0
    longer = run(*settings, output=tmp_path / "run")
    assert longer.process.exitcode == 0
    at_once = run(*settings, output=tmp_path / "at once")
    assert_same_run(longer.folder, at_once.folder)
    assert losses(longer.folder) != losses(undisturbed)


def test_a_loss_that_is_not_finite_stops_with_the_examples(tmp_path: Path) -> None:
    stopped = run(*SMALL, "--train.lr=1e30", "--train.warmup_steps=0", output=tmp_path / "run")
    assert stopped.process.exitcode == 1
    file = stopped.folder / "non_finite_step_0.json"
    assert str(file) in stopped.text()
    assert "--train.lr" in stopped.text()
    report = json.loads(file.read_text())
    assert not np.isfinite([float(report["loss"]), float(report["grad_norm"])]).all()
    assert sum(map(len, report["examples"])) == 16
    assert not (stopped.folder / "results.json").exists()
