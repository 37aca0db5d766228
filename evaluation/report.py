"""Run folders -> comparison tables, figures and paired tests, as Markdown and as one self-contained page.

Only runs on the same split, ranked in the same way, share a table: other figures do not compare.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from .plots import comparison, learning_curves
from .protocols import metric_prefix
from .run_folders import Run, load_run
from .significance import PairedDifference, compare_runs
from .tables import Table, all_metrics_table, headline_table, incomplete_table, seeds_table, slices_table


@dataclass(frozen=True)
class Plot:
    name: str  # of the PNG file
    caption: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Section:
    """Runs that may be compared; or, last, those that are incomplete."""

    title: str
    subtitle: str
    tables: list[Table]
    plots: list[Plot]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    runs: list[Run]
    sections: list[Section]


def build_report(folders: Sequence[Path]) -> Report:
    """Read run folders and arrange them: a section a split and way of ranking, then the incomplete runs."""
    runs = [load_run(folder) for folder in folders]
    comparable: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.complete:
            comparable.setdefault(_how_ranked(run), []).append(run)
    sections = [_section(group, number) for number, group in enumerate(comparable.values(), start=1)]
    incomplete = [run for run in runs if not run.complete]
    return Report(runs, sections + ([_incomplete_section(incomplete)] if incomplete else []))


def write_report(report: Report, folder: Path) -> None:
    """Write report.md with its PNG files, and report.html, which carries its images inside, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for plot in section.plots:
            (folder / plot.name).write_bytes(plot.light)
    (folder / "report.md").write_text(_markdown(report), encoding="utf-8")
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    templates.filters["base64"] = lambda data: base64.b64encode(data).decode()
    page = templates.get_template("report.html.j2").render(report=report)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _how_ranked(run: Run) -> tuple[Any, ...]:
    """What must be equal for two runs to share a table."""
    return (
        run.split_hash,
        *(run.header.get(entry) for entry in ("protocol", "mask", "ties", "candidates_hash")),
    )


def _section(runs: list[Run], number: int) -> Section:
    first, header = runs[0], runs[0].header
    headline = [metric_prefix(header.get("protocol", "full")) + name for name in ("HR@10", "NDCG@10")]
    differences, notes = _paired_tests(runs)
    tables = [headline_table(runs, headline, differences), all_metrics_table(runs)]
    if seeds := _seeds_table(runs, headline, notes):
        tables.insert(1, seeds)
    if new := slices_table(runs, headline):
        tables.append(new)
    return Section(
        title=f"{first.results.get('dataset', 'unnamed data')}, split {first.split_hash[:12]}",
        subtitle=", ".join(
            f"{label} {header[entry]}"
            for label, entry in (
                ("users", "users_evaluated"),
                ("items", "catalog_size"),
                ("protocol", "protocol"),
                ("mask", "mask"),
                ("ties", "ties"),
            )
            if entry in header
        ),
        tables=tables,
        plots=[
            Plot(
                f"comparison-{number}.png",
                "Test metrics with 95 % intervals",
                comparison(runs, headline, "light"),
                comparison(runs, headline, "dark"),
            ),
            *_curves(runs, f"curves-{number}.png"),
        ],
        notes=notes,
    )


def _incomplete_section(runs: list[Run]) -> Section:
    return Section(
        title="Incomplete runs",
        subtitle="Still running, crashed, or not evaluated: left out of every comparison.",
        tables=[incomplete_table(runs)],
        plots=_curves(runs, "curves-incomplete.png"),
    )


def _curves(runs: list[Run], name: str) -> list[Plot]:
    """No plot where no run logged anything."""
    if not any(run.training or run.validation for run in runs):
        return []
    light, dark = (learning_curves(runs, "NDCG@10", theme) for theme in ("light", "dark"))
    return [Plot(name, "Learning curves", light, dark)]


def _paired_tests(runs: list[Run]) -> tuple[dict[Path, PairedDifference], list[str]]:
    """NDCG@10 of each run against the first one's, user by user; what cannot be tested becomes a note."""
    differences: dict[Path, PairedDifference] = {}
    notes: list[str] = []
    first = runs[0]
    for run in runs[1:]:
        try:
            [differences[run.folder]] = compare_runs(first.ranks_path, run.ranks_path, ("NDCG@10",))
        except (ValueError, OSError) as error:  # pyarrow's errors are among them
            notes.append(f"{run.name} is not tested against {first.name}: {error}")
    return differences, notes


def _seeds_table(runs: list[Run], headline: list[str], notes: list[str]) -> Table | None:
    """Runs that differ only in their seed taken together, against the first of them; None where none do."""
    by_name: dict[tuple[str, ...], dict[Path, Run]] = {}
    for run in runs:
        by_name.setdefault(run.seeds, {})[run.folder] = run
    groups = [list(group.values()) for group in by_name.values()]
    if all(len(group) == 1 for group in groups):
        return None
    differences: dict[Path, PairedDifference] = {}
    paths = [[run.ranks_path for run in group] for group in groups]
    for group, own in zip(groups[1:], paths[1:], strict=True):
        try:
            [differences[group[0].folder]] = compare_runs(paths[0], own, ("NDCG@10",))
        except (ValueError, OSError) as error:  # pyarrow's errors are among them
            notes.append(f"the seeds of {group[0].name} are not tested together: {error}")
    return seeds_table(groups, headline, differences)


def _markdown(report: Report) -> str:
    lines = ["# shardrec report", ""]
    for section in report.sections:
        lines += [f"## {section.title}", "", section.subtitle, ""]
        for table in section.tables:
            if table.title:
                lines += [f"### {table.title}", ""]
            lines += [_markdown_row(table.columns), _markdown_row(["---"] * len(table.columns))]
            lines += [_markdown_row(row) for row in table.rows] + [""]
        lines += [f"> {note}\n" for note in section.notes]
        lines += [f"![{plot.caption}]({plot.name})\n" for plot in section.plots]
    return "\n".join(lines)


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
