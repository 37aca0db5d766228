"""The report's tables: text in cells, for the console, Markdown and HTML alike."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .run_folders import Run, popularity_of
from .significance import PairedDifference

ABSENT = "-"
# With one target a user, Recall, MAP and Precision repeat these.
_METRICS = ("HR", "NDCG", "MRR", "coverage")


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]
    title: str = ""


def headline_table(runs: list[Run], headline: list[str], differences: dict[Path, PairedDifference]) -> Table:
    """A row a run: size, `headline` metrics, test against the first run, speed; and a row for popularity."""
    columns = ["run", "model", "parameters (trained)", *headline, "Δ NDCG@10", "p", "training", "samples/s"]
    rows = []
    for run in runs:
        timing, parameters = run.results.get("timing", {}), run.results.get("parameters", {})
        test = run.results["test"]
        difference = differences.get(run.folder)
        rows.append(
            [
                run.name,
                str(run.results.get("model", ABSENT)),
                f"{_count(parameters.get('total'))} ({_count(parameters.get('trainable'))})",
                *(_with_interval(test, metric) for metric in headline),
                ABSENT if difference is None else _signed_with_interval(difference),
                ABSENT if difference is None else _p_value(difference.p_value),
                _duration(timing.get("train_seconds")),
                _count(timing.get("samples_per_s")),
            ]
        )
    if popularity := popularity_of(runs):
        values = [_with_interval(popularity, metric) for metric in headline]
        rows.append(["popularity", "baseline", ABSENT, *values, ABSENT, ABSENT, ABSENT, ABSENT])
    return Table(columns, rows)


def seeds_table(groups: list[list[Run]], headline: list[str], differences: dict[Path, PairedDifference]) -> Table:
    """A row a group: mean and deviation of its seeds, and the test of all of them against the first group's."""
    rows = []
    for group in groups:
        difference = differences.get(group[0].folder)
        rows.append(
            [
                *(group[0].seeds[-2] if len(group) > 1 else group[0].name, str(len(group))),
                *(_mean_and_deviation([run.results["test"].get(metric) for run in group]) for metric in headline),
                ABSENT if difference is None else _signed_with_interval(difference),
                ABSENT if difference is None else _p_value(difference.p_value),
            ]
        )
    return Table(["runs", "seeds", *headline, "Δ NDCG@10", "p"], rows, title="Seeds together")


def all_metrics_table(runs: list[Run]) -> Table:
    """Every cutoff of the metrics that differ with one target a user."""
    names = [
        name
        for name in runs[0].results["test"]
        if name.rpartition("/")[2].partition("@")[0] in _METRICS and "@" in name
    ]
    names.sort(key=lambda name: _METRICS.index(name.rpartition("/")[2].partition("@")[0]))
    rows = [[run.name, *(_figure(run.results["test"].get(name)) for name in names)] for run in runs]
    if popularity := popularity_of(runs):
        rows.append(["popularity", *(_figure(popularity.get(name)) for name in names)])
    return Table(["run", *names], rows, title="All cutoffs")


def slices_table(runs: list[Run], headline: list[str]) -> Table | None:
    """A row a run and kind of target, new items and known ones; None where the split has no new ones."""
    names = {
        "cold": "items that training has not seen",
        "warm": "all other items",
        "cold-only": "items that training has not seen, ranked among each other",
    }
    rows = [
        [run.name, names[kind], str(part["targets"]), *(_with_interval(part, metric) for metric in headline)]
        for run in runs
        for kind, part in run.results["test"].get("slices", {}).items()
    ]
    return Table(["run", "targets", "number", *headline], rows, title="New items") if rows else None


def incomplete_table(runs: list[Run]) -> Table:
    """How far each run came, and what its folder lacks."""
    rows = [
        [
            run.name,
            str(run.results.get("model", ABSENT)),
            str(max((line.get("step", 0) for line in run.training), default=ABSENT)),
            "; ".join(run.missing),
        ]
        for run in runs
    ]
    return Table(["run", "model", "last step", "missing"], rows)


def _figure(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _with_interval(metrics: dict[str, Any], name: str) -> str:
    interval = metrics.get("intervals", {}).get(name)
    brackets = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return _figure(metrics.get(name)) + brackets


def _signed_with_interval(difference: PairedDifference) -> str:
    low, high = difference.interval
    return f"{difference.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _count(value: float | None) -> str:
    """1234567 -> "1.2M"."""
    if value is None:
        return ABSENT
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1000 if letter == 'k' else size):.1f}{letter}"
    return f"{value:,.0f}"


def _mean_and_deviation(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ABSENT
    return f"{fmean(known):.4f}" + (f" ± {stdev(known):.4f}" if len(known) > 1 else "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
