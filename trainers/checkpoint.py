"""Checkpoints: written whole or not at all, verified when read, trainable weights only.

checkpoints/
    step-00000120/   model.safetensors  optimizer.safetensors  manifest.json (progress, and the checksum of everything)
    LATEST           name of the newest complete checkpoint, written last
    BEST             name of the one with the best validation metric

Both pointers only repeat what the newest manifest says; a run that goes on after a crash writes them anew.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .progress import Progress
from .state import TrainingState, load_optimizer_state, load_weights, load_weights_of_main
from .zero import Zero

logger = logging.getLogger("shardrec")


class CannotSave(OSError):
    """A checkpoint could not be written: the disk is full, or not ours to write."""


class CorruptCheckpoint(ValueError):
    """A checkpoint folder whose files are missing or differ from its manifest."""


class Checkpoints:
    """The checkpoints of one run. Only the main process may change them."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def at(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def save(self, state: TrainingState, progress: Progress) -> None:
        """Write a checkpoint of this step, point LATEST and BEST where they belong, and drop old ones.

        From the first checkpoint on there is a whole one on the disk at every moment. Raises `CannotSave` where the
        disk does not take it; the checkpoints before it stay as they are.
        """
        checkpoint = self.at(progress.step)
        unfinished = self.folder / f".{checkpoint.name}.unfinished"
        try:
            self._write(unfinished, state, progress)
            unfinished.rename(checkpoint)
            self._finish(progress)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CannotSave(
                f"the checkpoint of step {progress.step} cannot be written to {self.folder}: {error}. The last one "
                "there is whole: make room or mend its rights, and start the same command again"
            ) from error

    def note(self, progress: Progress) -> None:
        """Write the progress of the step that was saved last anew: after a validation nothing else has changed."""
        checkpoint = self.at(progress.step)
        try:
            manifest = _read_manifest(checkpoint)
            _write_manifest(checkpoint, progress, manifest["sha256"], manifest["scaler"])
            self._finish(progress)
        except OSError as error:
            raise CannotSave(f"{checkpoint} cannot be written: {error}") from error

    def _write(self, folder: Path, state: TrainingState, progress: Progress) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(state.weights, folder / "model.safetensors")
        save_file(state.optimizer, folder / "optimizer.safetensors")
        files = sorted(folder.iterdir())
        _write_manifest(folder, progress, {file.name: _checksum(file) for file in files}, state.scaler)
        for path in [*files, folder]:
            _flush(path)

    def _finish(self, progress: Progress) -> None:
        _flush(self.folder)
        self._point(progress)
        self._rotate(progress)

    def latest(self) -> Path | None:
        """Return the newest checkpoint that verifies; a damaged one is named in the log and passed over."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                verify(folder)
            except CorruptCheckpoint as error:
                logger.warning("%s; going back to the checkpoint before it", error)
                continue
            return folder
        return None

    def best(self) -> Path | None:
        """Return the checkpoint with the best validation metric, if one was saved."""
        pointer = self.folder / "BEST"
        return self.folder / pointer.read_text().strip() if pointer.exists() else None

    def go_on_from(self, checkpoint: Path | None, progress: Progress) -> None:
        """Leave only what led to `checkpoint`: later, damaged and unfinished ones go, and all if it is not of here."""
        own = checkpoint is not None and checkpoint.resolve().parent == self.folder.resolve()
        for folder in self.folder.glob("step-*"):
            if not own or folder > self.at(progress.step):
                shutil.rmtree(folder)
        for folder in self.folder.glob(".step-*.unfinished"):
            shutil.rmtree(folder)
        if self.folder.is_dir():
            self._point(progress)

    def _point(self, progress: Progress) -> None:
        for name, step in (("BEST", progress.best_step), ("LATEST", progress.step)):
            if step is not None and self.at(step).is_dir():
                _write(self.folder / name, self.at(step).name + "\n")
            else:
                (self.folder / name).unlink(missing_ok=True)

    def _rotate(self, progress: Progress) -> None:
        best = None if progress.best_step is None else self.at(progress.best_step)
        for folder in sorted(self.folder.glob("step-*"))[: -self.keep]:
            if folder != best:
                shutil.rmtree(folder)


def verify(folder: Path) -> Progress:
    """Return the progress of a checkpoint; raise `CorruptCheckpoint` unless every part of it has its checksum."""
    try:
        manifest = _read_manifest(folder)
        checksums, progress, scaler = dict(manifest["sha256"]), manifest["progress"], manifest["scaler"]
        expected = checksums.pop("progress")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"checkpoint {folder} has no readable manifest.json") from error
    if _checksum_of_progress(progress, scaler) != expected:
        raise CorruptCheckpoint(f"checkpoint {folder}: the progress in manifest.json differs from its checksum")
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            raise CorruptCheckpoint(f"checkpoint {folder} lacks {name}")
        if _checksum(folder / name) != checksum:
            raise CorruptCheckpoint(f"checkpoint {folder}: {name} differs from its checksum in manifest.json")
    return Progress(**progress)


def restore_weights(folder: Path, model: nn.Module) -> Progress:
    """Load the weights of a checkpoint that verifies; return its progress."""
    progress = verify(folder)
    load_weights(model, folder / "model.safetensors")
    return progress


def restore_weights_of_main(folder: Path, model: nn.Module, is_main: bool) -> None:
    """Load the weights of a checkpoint on all processes, though only the main one need see it. Collective."""
    if is_main:
        verify(folder)
    load_weights_of_main(model, folder / "model.safetensors", is_main)


def restore_optimizer(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    zero: Zero | None = None,
) -> None:
    """Load the optimizer's state of a checkpoint that verifies, after the model is prepared for its launch."""
    verify(folder)
    load_optimizer_state(model, optimizer, zero, load_file(folder / "optimizer.safetensors"))
    if scaler is not None and (saved := _read_manifest(folder)["scaler"]):
        scaler.load_state_dict(saved)


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def _write_manifest(folder: Path, progress: Progress, checksums: dict[str, str], scaler: dict[str, Any]) -> None:
    checksums = checksums | {"progress": _checksum_of_progress(progress.state(), scaler)}
    manifest = {"progress": progress.state(), "scaler": scaler, "sha256": checksums}
    _write(folder / "manifest.json", json.dumps(manifest, indent=1))


def _checksum_of_progress(progress: dict[str, Any], scaler: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([progress, scaler], sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(file: Path, text: str) -> None:
    """Replace a small file in one step, so that a reader sees the old text or the new one."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text)
    _flush(unfinished)
    unfinished.replace(file)


def _flush(path: Path) -> None:
    """Force a file's (or folder's) bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
