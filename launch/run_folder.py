"""The run folder: what a run leaves behind, and what a later command finds there."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from data.interactions import Catalog
from trainers.runtime import Runtime
from trainers.tracking import flat

from .config import RunConfig, dump, parse

# Settings that change how fast a run is or what it writes, not what it computes: a resumed run may differ in them.
MAY_DIFFER = (
    "data.root",
    "data.cache",
    "train.micro_batch_size",
    "train.eval_batch_size",
    "train.trackers",
    "train.epochs",
    "train.max_steps",
    "train.patience",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.log_every_steps",
    "train.timeout_seconds",
)
CLAIM_SECONDS = 5  # how long a run that was just stopped may take to leave its folder
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "datasets", "bitsandbytes", "numpy")


class RunFolder:
    """Paths and files of runs/<name>/; docs/architecture.md lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.results_file = path / "results.json"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    def ranks(self, phase: str) -> Path:
        return self.path / "ranks" / f"{phase}.parquet"

    def is_finished(self, config: RunConfig) -> bool:
        """Whether results are there and no other length of training is asked for; refuse a folder of another run."""
        self.require_same(config)
        if not self.results_file.is_file():
            return False
        trained = yaml.safe_load(self.config_file.read_text())["train"]
        return all(trained[name] == getattr(config.train, name) for name in ("epochs", "max_steps", "patience"))

    def begin(self, config: RunConfig, runtime: Runtime) -> None:
        """Make the folder and write what the run is and where it runs; refuse a folder of a different run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
        except OSError as error:
            sys.exit(f"error: --output {self.path} cannot be written: {error.strerror}")
        if config.resume != "never":
            self.require_same(config)
        self.results_file.unlink(missing_ok=True)  # of the training that is now repeated or prolonged
        _write(self.config_file, yaml.safe_dump(dump(config), sort_keys=False))
        _write(self.path / "environment.json", json.dumps(describe_environment(runtime), indent=1))

    def _claim(self) -> None:
        """Keep other runs out of this folder until this process ends, however it ends."""
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=CLAIM_SECONDS)
        except Timeout:
            sys.exit(f"error: another run is using {self.path}: choose another --output, or wait until it has ended")

    def require_same(self, config: RunConfig) -> None:
        """Exit with the settings that differ when this folder holds another run."""
        if not self.config_file.is_file():
            return
        # read like a recipe: a setting that came after that run began has its default there
        old, new = flat(dump(parse(["--config", str(self.config_file)]))), flat(dump(config))
        different = [
            f"{name}: {old.get(name)} there, {new.get(name)} here"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and name not in MAY_DIFFER
        ]
        if different:
            sys.exit(
                f"error: {self.path} holds a run with other settings ({'; '.join(different[:5])}). "
                "Choose another --output, or --resume never to overwrite it"
            )

    def save_model(
        self,
        config: RunConfig,
        weights: dict[str, torch.Tensor],
        catalog: Catalog,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Write model/: everything that is needed to recommend, as safetensors and JSON."""
        self.model.mkdir(exist_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.model / "tokenizer")
        save_file(weights, self.model / "model.safetensors")
        (self.model / "config.json").write_text(json.dumps(dump(config), indent=1))
        write_catalog(catalog, self.model / "catalog.json")

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json last and in one step: a run with results is finished."""
        _write(self.results_file, json.dumps(results, indent=1))

    def results(self) -> dict[str, Any]:
        return json.loads(self.results_file.read_text())


def _write(file: Path, text: str) -> None:
    """Replace a file in one step, so that a run that is killed here leaves the old text or the new one."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


def write_catalog(catalog: Catalog, file: Path) -> None:
    """Write titles, categories and raw ids as JSON."""
    file.write_text(json.dumps(asdict(catalog)))


def read_catalog(file: Path) -> Catalog:
    """Read what `write_catalog` wrote."""
    fields = json.loads(file.read_text())
    return Catalog(
        titles=tuple(fields["titles"]),
        categories=tuple(map(tuple, fields["categories"])),
        raw_ids=tuple(fields["raw_ids"]),
        has_titles=fields["has_titles"],
    )


def describe_environment(runtime: Runtime) -> dict[str, Any]:
    """Return versions, commit, hardware and the launch command."""
    device = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else describe_processor()
    return {
        "command": sys.argv,
        "commit": commit_of_clone(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": f"{runtime.device.type}: {device or platform.machine()}",
        "threads": torch.get_num_threads(),
        "precision": runtime.precision,
        "strategy": runtime.strategy,
        "world_size": runtime.share.num_processes,
    }


def describe_processor() -> str:
    """Return the processor's model where Linux tells, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]}, {len(models)} cores" if models else platform.processor()


def commit_of_clone() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a git checkout
