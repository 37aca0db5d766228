"""Checkpoints: written whole or not at all, verified when read, trainable weights only.

checkpoints/
    step-00000120/   model.safetensors  optimizer.pt  manifest.json (progress, and the checksum of everything)
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
from safetensors.torch import load_file, save_file
from torch import nn

from .progress import Progress

logger = logging.getLogger("shardrec")


class CorruptCheckpoint(ValueError):
    """A checkpoint folder whose files are missing or differ from its manifest."""


class Checkpoints:
    """The checkpoints of one run. Only the main process may change them."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def at(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Write a checkpoint of this step, point LATEST and BEST where they belong, and drop old ones.

        The weights of a step are written once: when only the progress has changed, after a validation, only the
        manifest is replaced. From the first checkpoint on there is a whole one on the disk at every moment.
        """
        checkpoint = self.at(progress.step)
        if checkpoint.is_dir():
            _write_manifest(checkpoint, progress, _read_manifest(checkpoint)["sha256"])
        else:
            unfinished = self.folder / f".{checkpoint.name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save_file(trainable_state(model), unfinished / "model.safetensors")
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
            torch.save(state, unfinished / "optimizer.pt")
            files = sorted(unfinished.iterdir())
            _write_manifest(unfinished, progress, {file.name: _checksum(file) for file in files})
            for path in [*files, unfinished]:
                _flush(path)
            unfinished.rename(checkpoint)
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
        checksums, progress = dict(manifest["sha256"]), manifest["progress"]
        expected = checksums.pop("progress")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"checkpoint {folder} has no readable manifest.json") from error
    if _checksum_of_progress(progress) != expected:
        raise CorruptCheckpoint(f"checkpoint {folder}: the progress in manifest.json differs from its checksum")
    for name, checksum in checksums.items():
        if not (folder / name).is_file():
            raise CorruptCheckpoint(f"checkpoint {folder} lacks {name}")
        if _checksum(folder / name) != checksum:
            raise CorruptCheckpoint(f"checkpoint {folder}: {name} differs from its checksum in manifest.json")
    return Progress(**progress)


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Progress:
    """Load a checkpoint that verifies: trainable weights, and what else is given; return its progress."""
    progress = verify(folder)
    load_trainable_state(model, folder / "model.safetensors")
    if optimizer is not None:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    return progress


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters by name, on the CPU; tied parameters appear once."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable_state(model: nn.Module, file: Path) -> None:
    """Copy the weights in `file` into the trainable parameters of `model`; both must have the same names."""
    saved = load_file(file)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unexpected = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    wrong = sorted(n for n in own.keys() & saved.keys() if own[n].shape != saved[n].shape)
    if missing or unexpected or wrong:
        raise ValueError(
            f"{file} does not fit this model: missing {missing[:3]}, unexpected {unexpected[:3]}, "
            f"other shapes {wrong[:3]}: was it trained with other --method or --backbone settings?"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def _read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def _write_manifest(folder: Path, progress: Progress, checksums: dict[str, str]) -> None:
    checksums = checksums | {"progress": _checksum_of_progress(progress.state())}
    _write(folder / "manifest.json", json.dumps({"progress": progress.state(), "sha256": checksums}, indent=1))


def _checksum_of_progress(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


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
