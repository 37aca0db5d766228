"""Every method under every strategy: it trains like one process, checkpoints, resumes and evaluates the same.

python benchmarks/grid.py                                (all cells, and the table of docs/scaling.md)
python benchmarks/grid.py --rows "bigrec LoRA 4-bit" --strategies zero3     (these cells of it)
python benchmarks/grid.py --missing                      (cells that have no figure yet; each is kept as soon as it has)

A cell is one run of 50 steps that is stopped after 25 and started again, so its second half comes from a checkpoint.
Dropout is off, for it differs between processes; everything else is as in any run.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.document import hardware, write_section
from benchmarks.grid_rows import ONE_PASS, ROWS, bound, save_inputs, settings
from benchmarks.processes import ROOT, launched
from launch.run_folder import commit_of_clone

RESULTS = ROOT / "benchmarks" / "results" / "grid.json"
STEPS = 50
STRATEGIES = ("one", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
CONTROL = "one, rows split otherwise"  # how far rounding alone takes one process from itself
COLUMNS = (STRATEGIES[0], CONTROL, *STRATEGIES[1:])


@dataclass
class Cell:
    """What was measured of one row under one strategy."""

    row: str
    strategy: str
    loss_difference: float  # largest, over the logged steps
    resumed: bool
    same_evaluation: bool  # the processes ranked every user as one process ranks them with the saved weights
    seconds: float
    commit: str | None = None  # that it was measured at; cells may be measured one by one

    @property
    def is_within_bound(self) -> bool:
        """The control has none: it is what bounds are judged by."""
        return self.strategy == CONTROL or self.loss_difference <= bound(self.row)

    @property
    def holds(self) -> bool:
        return self.is_within_bound and self.resumed and self.same_evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every method under every strategy.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--strategies", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--missing", action="store_true", help="leave out cells that have a figure")
    arguments = parser.parse_args()
    whole = arguments.rows == list(ROWS) and arguments.strategies == list(COLUMNS) and not arguments.missing
    cells = {} if whole else earlier_cells()
    known = set(cells) if arguments.missing else set()
    ran, commit = [], commit_of_clone()  # asked once: writing figures changes the clone
    with TemporaryDirectory() as folder:
        save_inputs(Path(folder))
        for row in arguments.rows:
            wanted = [column for column in arguments.strategies if (row, column) not in known and exists(row, column)]
            for strategy in dict.fromkeys(("one", *wanted)) if wanted else ():  # all are compared with one process
                cell = cells[row, strategy] = run_cell(row, strategy, Path(folder), commit)
                ran.append(cell)
                print(cell, flush=True)
                write(cells)
    sys.exit(0 if all(cell.holds for cell in ran) else 1)


def exists(row: str, column: str) -> bool:
    """Whether there is such a cell: rows whose negatives come from the micro-batch would learn another task."""
    return column != CONTROL or ONE_PASS not in ROWS[row]


def write(cells: Mapping[tuple[str, str], Cell]) -> None:
    """Write all figures, and the table of docs/scaling.md."""
    kept = [asdict(cells[key]) for key in product(ROWS, COLUMNS) if key in cells]
    RESULTS.write_text(json.dumps({"hardware": hardware(), "cells": kept}, indent=1))
    write_section(ROOT / "docs" / "scaling.md", "benchmarks/grid.py", markdown(cells))


def earlier_cells() -> dict[tuple[str, str], Cell]:
    """Return the cells that were measured before, to put new ones among them; exit where another machine did."""
    results = json.loads(RESULTS.read_text())
    if results["hardware"] != hardware():
        sys.exit(
            f"error: {RESULTS} was measured on {results['hardware']}, and this is {hardware()}: measure all cells "
            "here, without --rows and --strategies"
        )
    return {(cell["row"], cell["strategy"]): Cell(**cell) for cell in results["cells"]}


def run_cell(row: str, strategy: str, folder: Path, commit: str | None) -> Cell:
    """Train half, go on with the other half, and evaluate what was saved in one process."""
    run, started = folder / row.replace(" ", "-") / strategy, time.perf_counter()
    run.parent.mkdir(exist_ok=True)
    world, processes = environment(strategy, folder), 1 if strategy in ("one", CONTROL) else 2
    flags, output = settings(row, folder) + ["--train.micro_batch_size=2"] * (strategy == CONTROL), ""
    for steps in (STEPS // 2, STEPS):
        output = launched(*flags, f"--train.max_steps={steps}", output=run, processes=processes, environment=world)
    return Cell(
        row,
        strategy,
        loss_difference(run, run.with_name("one")),
        "resuming" in output,
        same_evaluation(run, row),
        round(time.perf_counter() - started, 1),
        commit,
    )


def environment(strategy: str, folder: Path) -> dict[str, str]:
    """Return what `accelerate launch` sets for the configuration of a strategy; `folder` takes a changed file.

    ZeRO-3 would keep weights as small as these whole, so it is told not to.
    """
    if strategy in ("one", CONTROL):
        return {}
    configuration = yaml.safe_load((ROOT / "launch" / "accelerate" / f"{strategy}.yaml").read_text())
    if configuration["distributed_type"] != "DEEPSPEED":
        return {}
    file = ROOT / configuration["deepspeed_config"]["deepspeed_config_file"]
    if strategy.startswith("zero3"):
        deepspeed = json.loads(file.read_text())
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        file = folder / file.name
        file.write_text(json.dumps(deepspeed))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def loss_difference(run: Path, reference: Path) -> float:
    """Return the largest difference of a step's loss; both must have the same steps."""
    ours, theirs = losses(run), losses(reference)
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        raise RuntimeError(f"{run} logged the steps {[step for step, _ in ours]}, {reference} others")
    return max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def same_evaluation(run: Path, row: str) -> bool:
    """Whether launch/evaluate.py, in one process, ranks every test user as the run did.

    A stage that ranks nothing has a loss on what is held out instead: it must be that of the run of one process.
    """
    results = _results(run)
    if "header" not in results:
        return abs(results["valid"]["loss"] - _results(run.with_name("one"))["valid"]["loss"]) <= bound(row)
    launched(f"--protocol={results['header']['protocol']}", output=run, script="evaluate")
    (again,) = (run / "evaluations").glob("*.parquet")
    return pd.read_parquet(again).equals(pd.read_parquet(run / "ranks" / "test.parquet"))


def _results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def markdown(cells: Mapping[tuple[str, str], Cell]) -> str:
    """Return the table: the largest loss difference of each cell, or what failed.

    Empty where none was measured, a dash where there is no such cell.
    """
    lines = ["| method and base | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for row in ROWS:
        entries = [
            (entry(cells[row, column]) if (row, column) in cells else "") if exists(row, column) else "-"
            for column in COLUMNS
        ]
        lines.append(f"| {row} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def entry(cell: Cell) -> str:
    if cell.holds:
        return f"{cell.loss_difference:.0e}"
    reasons = {
        "above its bound": not cell.is_within_bound,
        "does not resume": not cell.resumed,
        "evaluates otherwise": not cell.same_evaluation,
    }
    return f"{cell.loss_difference:.0e} " + ", ".join(reason for reason, is_so in reasons.items() if is_so)


if __name__ == "__main__":
    main()
