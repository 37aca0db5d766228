"""Compare runs: python launch/report.py runs/* --to report

Prints the comparison tables and writes report.md, its figures and one self-contained report.html.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as ConsoleTable

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

from evaluation.report import Report, build_report, write_report
from evaluation.tables import Table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare run folders in tables, figures and paired tests.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, such as runs/*")
    parser.add_argument("--to", type=Path, default=Path("report"), help="folder to write to (default: report)")
    options = parser.parse_args(arguments)
    folders = [folder for folder in options.runs if folder.is_dir()]
    if not folders:
        parser.error(f"no run folder among {[str(path) for path in options.runs]}; expected folders such as runs/NAME")
    report = build_report(folders)
    write_report(report, options.to)
    console = Console()
    _print_tables(report, console)
    console.print(f"Wrote {options.to / 'report.html'} and {options.to / 'report.md'}")


# What has no room on a terminal; the report has it.
_LEFT_OUT = {"model", "parameters (trained)", "training", "samples/s"}
_SHOWN = {"", "Seeds together"}


def _print_tables(report: Report, console: Console) -> None:
    for section in report.sections:
        console.rule(f"[bold]{section.title}")
        console.print(section.subtitle, style="dim")
        for table in section.tables:
            if table.title in _SHOWN:
                console.print(_console_table(table))
        for note in section.notes:
            console.print(note, style="yellow")


def _console_table(table: Table) -> ConsoleTable:
    shown = ConsoleTable(title=table.title or None, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    kept = [index for index, column in enumerate(table.columns) if column not in _LEFT_OUT]
    for index in kept:
        is_figure = table.columns[index] not in ("run", "runs", "missing")
        shown.add_column(
            table.columns[index], justify="right" if is_figure else "left", no_wrap=is_figure, overflow="fold"
        )
    for row in table.rows:
        shown.add_row(*(row[index].replace(" [", "\n[") for index in kept))  # intervals below their figure
    return shown


if __name__ == "__main__":
    main()
