"""What each setting of UR4Rec V2 brings on MovieLens 100K: stage 2 of its recipe with one of them changed at a time.

python benchmarks/ur4rec_v2.py          (an hour on a core of its own; writes the table of docs/methods/ur4rec-v2.md)

Begins with the recipe's runs/ml-100k-sasrec. All runs have the same budget, a part of the recipe's, and no patience.
Runs that are there are not done again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.document import write_section
from evaluation.significance import compare_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ur4rec-v2.json"
METRIC = "NDCG@10"
EPOCHS, CUTS = 16, 8
COMMON = (
    f"--model ur4rec-v2 --recipe launch/recipes/ml-100k/ur4rec-v2.yaml --train.epochs {EPOCHS} --method.cuts {CUTS} "
    "--train.patience null --train.eval_every_epochs 2 --train.seed 42 --train.trackers []"
).split()
COSINE = "--train.schedule cosine --train.warmup_steps 150 --train.final_lr_ratio 0.001"
CLIPPED = '--train.max_grad_norms {"retriever":1.0,"memory":1.0}'
LARGER = "--method.hidden_size 128 --method.num_heads 8 --method.proxies 8"
ALL = (
    f"--method.fusion.kind user --method.fusion.curriculum_epochs 4 --method.balance uncertainty "
    f"--method.co_attention true {COSINE} {CLIPPED}"
)
REFERENCE = "settings of the recipe"
VARIANTS = {
    REFERENCE: "",
    "fusion learned": "--method.fusion.kind learned",
    "fusion learned, uncertainty weighting": "--method.fusion.kind learned --method.balance uncertainty",
    "fusion by user": "--method.fusion.kind user",
    "fusion by user, curriculum of 4 epochs": "--method.fusion.kind user --method.fusion.curriculum_epochs 4",
    "co-attention": "--method.co_attention true",
    "100 negatives, 30 % hard": "--method.num_negatives 100 --method.hard_share 0.3",
    "100 uniform negatives": "--method.num_negatives 100 --method.hard_share 0",
    "20 uniform negatives, and in-batch ones": "--method.num_negatives 20 --method.hard_share 0 --method.in_batch true",
    "cosine to 1e-6, warm-up of 5 epochs": COSINE,
    "clipping of each module to 1": CLIPPED,
    "together: fusion by user, curriculum, uncertainty, co-attention, cosine, clipping": ALL,
    "no memory": "--method.memory.enabled false",
    "experts without residual, as published": "--method.residual false",
    "width 128, 8 heads, 8 proxies": LARGER,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train UR4Rec V2 with one setting changed at a time.")
    parser.add_argument("--runs", type=Path, default=Path("runs/ur4rec-v2-settings"), help="folder of the runs")
    parser.add_argument("--sasrec", type=Path, default=Path("runs/ml-100k-sasrec"), help="the run of stage 1")
    parser.add_argument("--write", action="store_true", help="train nothing, and write the table of the runs there are")
    parser.add_argument("flags", nargs="*", help="flags for every run, behind --")
    arguments = parser.parse_args()
    for name in [] if arguments.write else VARIANTS:
        train(arguments.runs, name, [f"--method.sasrec={arguments.sasrec}", *arguments.flags])
    done = [found(arguments.runs, name) for name in VARIANTS if has_ended(arguments.runs, name)]
    environment = json.loads((folder_of(arguments.runs, REFERENCE) / "environment.json").read_text())
    for name in ("command", "commit"):  # of one run alone
        del environment[name]
    report = {"environment": environment, "epochs": EPOCHS, "cuts": CUTS, "runs": done}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    write_section(ROOT / "docs" / "methods" / "ur4rec-v2.md", "benchmarks/ur4rec_v2.py", markdown(report))


def train(runs: Path, name: str, flags: list[str]) -> None:
    """Do a run, go on with it, or leave it as it is when it has ended."""
    if not has_ended(runs, name):
        own = [*VARIANTS[name].split(), *flags, f"--output={folder_of(runs, name)}"]
        command = [sys.executable, "launch/train.py", *COMMON, *own]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def has_ended(runs: Path, name: str) -> bool:
    return (folder_of(runs, name) / "results.json").is_file()


def folder_of(runs: Path, name: str) -> Path:
    return runs / re.sub("[^a-z0-9]+", "-", name.lower())


def found(runs: Path, name: str) -> dict[str, Any]:
    """Return the figures of a run, and of its difference from the first one on the same users."""
    folder = folder_of(runs, name)
    results = json.loads((folder / "results.json").read_text())
    ranks = [path / "ranks" / "test.parquet" for path in (folder_of(runs, REFERENCE), folder)]
    (paired,) = compare_runs(ranks[0], ranks[1], (METRIC,))
    return {
        "name": name,
        "flags": VARIANTS[name],
        "valid": results["valid"][METRIC],
        "test": figure(results["test"]),
        "retriever alone": figure(results["parts"]["retriever"]["test"]),
        "sasrec alone": figure(results["parts"]["sasrec"]["test"]),
        "difference": (paired.difference, *paired.interval),
        "p": paired.p_value,
        "seconds": results["timing"]["train_seconds"],
    }


def figure(metrics: dict[str, Any]) -> tuple[float, float, float]:
    """Return a figure and its interval."""
    return (metrics[METRIC], *metrics["intervals"][METRIC])


def markdown(report: dict[str, Any]) -> str:
    machine, runs = report["environment"], report["runs"]
    where = f"{machine['device']}, {machine['threads']} thread, torch {machine['packages']['torch']}"
    lines = [
        f"{where}; {METRIC}, full ranking, seed 42, {report['epochs']} epochs of {report['cuts']} targets a user. "
        f"SASRec alone has {runs[0]['sasrec alone'][0]:.4f} on test. In brackets are 95 % bootstrap intervals over "
        "users; p is that of a paired permutation test of the difference from the first row.",
        "",
        "| what | validation | test | retriever alone, test | difference, test | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        cells = [run["name"], f"{run['valid']:.4f}"]
        cells += ["{:.4f} ({:.4f} to {:.4f})".format(*run[part]) for part in ("test", "retriever alone")]
        paired = ["{:+.4f} ({:+.4f} to {:+.4f})".format(*run["difference"]), f"{run['p']:.3f}"]
        lines.append("| " + " | ".join([*cells, *(paired if run is not runs[0] else ["", ""])]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
