"""Read run folders as they are found: whatever a crashed run did not write is listed, never raised."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

UNKNOWN_SPLIT = "unknown"
_RESULT_PARTS = ("split", "valid", "test", "popularity", "timing", "parameters")


@dataclass
class Run:
    """One run folder. A part that is absent or unreadable is empty here and named in `missing`."""

    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""  # YAML text
    training: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl that hold a loss
    validation: list[dict[str, Any]] = field(default_factory=list)  # lines that hold "valid/..." metrics
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seeds(self) -> tuple[str, ...]:
        """The same for runs that differ only in their seed: folders NAME-seedS in one place, of one model."""
        stem = re.sub(r"-seed\d+$", "", self.name)
        if stem == self.name:
            return (str(self.folder),)
        return (str(self.folder.parent), stem, str(self.results.get("model")))

    @property
    def ranks_path(self) -> Path:
        return self.folder / "ranks" / "test.parquet"

    @property
    def complete(self) -> bool:
        """Whether there are test metrics on a known split, which is all that a comparison needs."""
        return bool(self.results.get("test")) and self.split_hash != UNKNOWN_SPLIT

    @property
    def split_hash(self) -> str:
        return self.results.get("split", {}).get("hash", UNKNOWN_SPLIT)

    @property
    def header(self) -> dict[str, Any]:
        return self.results.get("test", {}).get("header", {})


def load_run(folder: Path) -> Run:
    """Read whatever there is in a run folder."""
    run = Run(folder)
    run.results = _read_part(run, "results.json", _json_object) or {}
    run.environment = _read_part(run, "environment.json", _json_object) or {}
    run.config = _read_part(run, "config.yaml", _yaml_text) or ""
    for part in _RESULT_PARTS:
        if not isinstance(run.results.get(part, {}), dict):
            run.missing.append(f"results.json has no usable {part!r}: {run.results.pop(part)!r}")
    lines = _read_part(run, "metrics.jsonl", lambda text: _json_lines(run, text)) or []
    run.training = [line for line in lines if "loss" in line]
    run.validation = [line for line in lines if any(key.startswith("valid/") for key in line)]
    if run.results and not run.results.get("test"):
        run.missing.append("results.json has no test metrics")
    if run.results and run.split_hash == UNKNOWN_SPLIT:
        run.missing.append("results.json has no split hash")
    if not run.ranks_path.is_file():
        run.missing.append("ranks/test.parquet")
    return run


def popularity_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The popularity baseline's test metrics, which runs on one split share; empty when no run has them."""
    return next((run.results["popularity"] for run in runs if run.results.get("popularity")), {})


def _read_part(run: Run, name: str, parse: Callable[[str], Any]) -> Any:
    path = run.folder / name
    if not path.is_file():
        run.missing.append(name)
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        run.missing.append(f"{name} ({str(error).splitlines()[0]})")
        return None


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found a {type(value).__name__}")
    return value


def _yaml_text(text: str) -> str:
    yaml.safe_load(text)
    return text


def _json_lines(run: Run, text: str) -> list[dict[str, Any]]:
    """The lines that can be read; a run that was killed while it wrote leaves a broken last one."""
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(_json_object(line))
        except ValueError:
            run.missing.append(f"metrics.jsonl line {number} is not a JSON object")
    return lines
