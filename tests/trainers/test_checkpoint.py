"""Checkpoints: whole or not there, whatever breaks the run or the files, and the best one always kept."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainers import checkpoint as checkpoint_module
from trainers.checkpoint import (
    CannotSave,
    Checkpoints,
    CorruptCheckpoint,
    restore_optimizer,
    restore_weights,
    verify,
)
from trainers.progress import Progress
from trainers.state import TrainingState, optimizer_state_of, weights_of


def model_and_optimizer(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> TrainingState:
    scaler_state = scaler.state_dict() if scaler else {}
    return TrainingState(weights_of(model), optimizer_state_of(model, optimizer, None), scaler_state)


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None) -> Progress:
    progress = restore_weights(folder, model)
    restore_optimizer(folder, model, optimizer, scaler)
    return progress


def saved(folder: Path, *steps: int, best: int | None = None, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        progress = Progress(step=step, best_step=best if best and best <= step else None)
        checkpoints.save(state(*model_and_optimizer(step)), progress)
    return checkpoints


def names(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(folder.name[-8:]) for folder in checkpoints.folder.glob("step-*"))


def pointer(checkpoints: Checkpoints, name: str) -> str:
    return (checkpoints.folder / name).read_text().strip()


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer()
    progress = Progress(step=7, epoch=2, step_in_epoch=1, seconds=1.5, best_metric=0.1 + 0.2, best_step=7)
    progress.log_window = {"loss": 1 / 3, "labels": 5.0}
    Checkpoints(tmp_path).save(state(model, optimizer), progress)
    other, other_optimizer = model_and_optimizer(seed=1)
    assert restore(tmp_path / "step-00000007", other, other_optimizer) == progress
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for own in (model, other):  # a further step shows that the moments are the same
        own.zero_grad()
        own(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_only_trainable_weights_are_saved_and_tied_ones_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    model[2].weight = model[1].weight
    assert set(weights_of(model)) == {"1.weight", "1.bias", "2.bias"}
    assert weights_of(model, keep=False) == {}, "of a process that does not write them"
    Checkpoints(tmp_path).save(state(model, torch.optim.SGD(model.parameters())), Progress(step=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5)
    restore_weights(tmp_path / "step-00000001", model)
    assert (model[0].weight == 5).all(), "frozen weights come from the base model"
    assert (model[1].weight != 5).any()
    assert model[2].weight is model[1].weight


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    folder = tmp_path / "step-00000001"
    with pytest.raises(ValueError, match=r"missing \['2\.bias'.*--backbone"):
        restore_weights(folder, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"unexpected \['1\.bias'"):
        restore_weights(folder, nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"other shapes \['1\.bias'"):
        restore_weights(folder, nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))


# --- Rotation and pointers ---


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, *range(1, 8), best=2, keep=2)
    assert names(checkpoints) == [2, 6, 7]
    assert pointer(checkpoints, "LATEST") == "step-00000007"
    assert pointer(checkpoints, "BEST") == "step-00000002"
    checkpoints.save(state(*model_and_optimizer()), Progress(step=8, best_step=8))
    assert names(checkpoints) == [7, 8], "a best checkpoint that was beaten goes"


def test_progress_alone_can_be_written_anew(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3)
    weights = checkpoints.at(3) / "model.safetensors"
    before = weights.stat().st_mtime_ns, weights.stat().st_ino
    checkpoints.note(Progress(step=3, validated_step=3, best_step=3, best_metric=0.5))
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == before
    assert verify(checkpoints.at(3)).validated_step == 3
    assert pointer(checkpoints, "BEST") == "step-00000003"


def test_going_on_forgets_what_came_later(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, 4, 6, 8, best=4)
    (tmp_path / ".step-00000009.unfinished").mkdir()
    checkpoints.go_on_from(checkpoints.at(6), Progress(step=6, best_step=4))
    assert names(checkpoints) == [2, 4, 6]
    assert (pointer(checkpoints, "LATEST"), pointer(checkpoints, "BEST")) == ("step-00000006", "step-00000004")
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("elsewhere", [None, "step-00000006"])
def test_starting_afresh_leaves_no_checkpoint_of_the_run_before(tmp_path: Path, elsewhere: str | None) -> None:
    """Else an old step 8 would outlive the new step 2 in rotation, and be resumed."""
    checkpoints = saved(tmp_path / "own", 6, 8, best=6)
    start = None if elsewhere is None else saved(tmp_path / "other", 6).at(6)
    checkpoints.go_on_from(start, Progress(step=0 if start is None else 6))
    assert names(checkpoints) == []
    assert checkpoints.latest() is None
    assert checkpoints.best() is None


# --- Damage ---

DAMAGE: dict[str, Callable[[Path], object]] = {
    "model.safetensors cut short": lambda f: os.truncate(f / "model.safetensors", 100),
    "model.safetensors with a flipped bit": lambda f: flip(f / "model.safetensors"),
    "model.safetensors missing": lambda f: (f / "model.safetensors").unlink(),
    "optimizer.safetensors cut short": lambda f: os.truncate(f / "optimizer.safetensors", 100),
    "optimizer.safetensors with a flipped bit": lambda f: flip(f / "optimizer.safetensors"),
    "optimizer.safetensors empty": lambda f: os.truncate(f / "optimizer.safetensors", 0),
    "manifest.json cut short": lambda f: os.truncate(f / "manifest.json", 30),
    "manifest.json missing": lambda f: (f / "manifest.json").unlink(),
    "manifest.json of nonsense": lambda f: (f / "manifest.json").write_text("[1]"),
    "progress changed": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"step": 4', '"step": 5')
    ),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    checkpoints = saved(tmp_path, 2, 4)
    damage(checkpoints.at(4))
    assert checkpoints.latest() == checkpoints.at(2)
    assert str(checkpoints.at(4)) in caplog.text
    with pytest.raises(CorruptCheckpoint, match="step-00000004"):
        restore(checkpoints.at(4), *model_and_optimizer())
    checkpoints.go_on_from(checkpoints.at(2), verify(checkpoints.at(2)))
    # The damaged one must not stand in the way of later ones, nor count as a recent one.
    checkpoints.keep = 1
    checkpoints.save(state(*model_and_optimizer()), Progress(step=3))
    assert checkpoints.latest() == checkpoints.at(3)


def test_if_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2, 4)
    for step in (2, 4):
        flip(checkpoints.at(step) / "optimizer.safetensors")
    assert checkpoints.latest() is None


# --- Crashes while saving ---


class Crash(BaseException):
    """Stands for the end of the process: nothing after it runs."""


DISK_WORK = ["save_file", "_checksum", "_flush", "_write", "_write_manifest"]


def crash_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[str]:
    """Let the process end right before its `call`-th piece of work on the disk; return the list of work done."""
    done: list[str] = []

    def watched(name: str, work: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **options: object) -> object:
            if len(done) == call:
                raise Crash
            done.append(name)
            return work(*args, **options)

        return wrapper

    for name in DISK_WORK:
        monkeypatch.setattr(checkpoint_module, name, watched(name, getattr(checkpoint_module, name)))
    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return done


@pytest.mark.parametrize("again", [False, True], ids=["new step", "validated step"])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, again: bool) -> None:
    """The run before, with its best at step 2, is at step 4; saving the step after it ends at every moment."""
    step, call, finished = (4 if again else 6), 0, False
    while not finished:
        folder = tmp_path / str(call)
        checkpoints = saved(folder, 2, best=2, keep=1)
        checkpoints.save(state(*model_and_optimizer(4)), Progress(step=4, best_step=2, best_metric=0.5))
        new = Progress(step=step, best_step=step, best_metric=0.6, validated_step=step)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, call)
            try:
                if again:
                    checkpoints.note(new)
                else:
                    checkpoints.save(state(*model_and_optimizer(step)), new)
                finished = True
            except Crash:
                call += 1
        # The next start of the run:
        latest = checkpoints.latest()
        assert latest is not None, f"nothing whole is left after {call} pieces of work"
        progress = restore(latest, *model_and_optimizer(99))
        assert (latest.name, progress.best_step) in ((checkpoints.at(4).name, 2), (checkpoints.at(step).name, step))
        checkpoints.go_on_from(latest, progress)
        assert pointer(checkpoints, "LATEST") == latest.name
        assert pointer(checkpoints, "BEST") == checkpoints.at(progress.best_step or 0).name
        assert checkpoints.best() is not None
        verify(checkpoints.best() or folder)
    assert call > (6 if again else 12), "crashes came at many moments"


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(CannotSave, match=r"step 4 .*No space left.*last one there is whole"):
            checkpoints.save(state(*model_and_optimizer()), Progress(step=4))
    assert checkpoints.latest() == checkpoints.at(2)
    checkpoints.save(state(*model_and_optimizer()), Progress(step=4))  # and once there is room again
    assert checkpoints.latest() == checkpoints.at(4)


def test_a_fp16_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    Checkpoints(tmp_path).save(state(*model_and_optimizer(), scaler), Progress(step=1))
    other = torch.amp.GradScaler("cpu")
    restore(tmp_path / "step-00000001", *model_and_optimizer(), other)
    assert other.get_scale() == 1024.0


def test_a_manifest_lists_every_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).at(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {file.name for file in folder.iterdir()} - {"manifest.json"} == set(manifest["sha256"]) - {"progress"}


def test_a_changed_scaler_is_damage_too(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1).at(1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"scaler": {"scale": 1.0}}))
    with pytest.raises(CorruptCheckpoint, match=r"differs from its checksum"):
        verify(folder)
