"""Keep the figures of finished runs in benchmarks/results/, and the table of docs/results.md up to date with them.

python benchmarks/record.py runs/ml-1m-sasrec runs/ml-100k-bigrec
python benchmarks/record.py                 (only writes the table again)
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.document import write_section

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description="Keep the figures of finished runs, and write the table of results.")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders; without any, only the table is written again")
    RESULTS.mkdir(exist_ok=True)
    for folder in parser.parse_args().runs:
        (RESULTS / f"{folder.name}.json").write_text(json.dumps(record(folder), indent=1) + "\n")
    table = markdown(sorted(RESULTS.glob("*-seed*.json")))
    write_section(ROOT / "docs" / "results.md", "benchmarks/record.py", table)


def record(folder: Path) -> dict[str, Any]:
    """Return what is worth keeping of a run: settings, figures and environment, without paths of this machine."""
    results = json.loads((folder / "results.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    for name in ("root", "cache"):
        settings["data"].pop(name, None)
    environment.pop("command")
    kept = (
        "model",
        "dataset",
        "split",
        "text_hash",
        "header",
        "valid",
        "test",
        "parts",
        "popularity",
        "parameters",
        "training",
        "timing",
    )
    return {
        **{name: results[name] for name in kept if name in results},
        "config": without_folders(settings),
        "environment": environment,
    }


def without_folders(settings: Any) -> Any:
    """Return settings in which a path of this machine is its last part only."""
    if isinstance(settings, dict):
        return {name: without_folders(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [without_folders(value) for value in settings]
    return Path(settings).name if isinstance(settings, str) and Path(settings).is_absolute() else settings


def markdown(files: list[Path]) -> str:
    """Return one row a group of runs that differ only in their seed (file names NAME-seedS.json)."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        groups[file.stem.split("-seed")[0]].append(json.loads(file.read_text()))
    rows = ["| run | data | seeds | HR@10 | NDCG@10 | popularity | train s | device |", "|" + " --- |" * 8]
    for name, runs in groups.items():
        first = runs[0]
        figures = [cell(runs, metric) for metric in ("HR@10", "NDCG@10")]
        popularity = "/".join(f"{first['popularity'][m]:.4f}" for m in ("HR@10", "NDCG@10"))
        data = f"{first['dataset']}, {first['split']['users']:,} users, {first['split']['items']:,} items"
        fastest = min(runs, key=lambda run: run["timing"]["train_seconds"])
        seconds = fastest["timing"]["train_seconds"]
        device = f"{fastest['environment']['device']}, {fastest['environment']['threads']} threads"
        rows.append(
            f"| {name} | {data} | {len(runs)} | {figures[0]} | {figures[1]} | {popularity} | {seconds:.0f} | {device} |"
        )
    return "\n".join(rows) + "\n"


def cell(runs: list[dict[str, Any]], metric: str) -> str:
    """Return a metric with its interval for one run, or the mean and the range over seeds."""
    values = [run["test"][metric] for run in runs]
    if len(runs) == 1:
        low, high = runs[0]["test"]["intervals"][metric]
        return f"{values[0]:.4f} ({low:.4f} to {high:.4f})"
    return f"{np.mean(values):.4f} (seeds {', '.join(f'{v:.4f}' for v in values)})"


if __name__ == "__main__":
    main()
