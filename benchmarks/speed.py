"""Write the table and the chart of docs/results.md from what the comparisons have left in benchmarks/results/.

python benchmarks/speed.py
"""

import json
import sys
from pathlib import Path
from string import ascii_uppercase
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.contest import QUIET, RESULTS, ROOT, which_seconds
from benchmarks.document import write_section

COMMAND = "benchmarks/speed.py"
CHART = ROOT / "docs" / "speed.svg"


def main() -> None:
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("speed-*.json"))]
    rows = [
        row | {key: report[key] for key in ("command", "hardware", "threads")}
        for report in reports
        for row in report["comparisons"]
    ]
    text = markdown(rows)
    write_section(ROOT / "docs" / "results.md", COMMAND, text)
    draw(rows, CHART)
    print(text)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return one line a comparison, with a letter for the machine that it was measured on."""
    places = [place_of(row) for row in rows]
    letters = dict(zip(dict.fromkeys(places), ascii_uppercase, strict=False))
    machines = "; ".join(f"{letter}: {place}" for place, letter in letters.items())
    busy = f" A figure beside it: cores that other work had meanwhile, where more than {QUIET}."
    lines = [
        f"Medians, and quartiles of the ratio. {machines}." + busy * any(map(is_busy, rows)),
        "",
        "| what | here | peer | ratio | aim | beside it | command | on |",
        "|" + " --- |" * 8,
    ]
    for row, place in zip(rows, places, strict=True):
        ratio = row["ratio"]
        cells = (
            f"{row['what']} ({row['ours']})",
            f"{figure(row['here']['median'])} {row['unit']}",
            f"{row['peer']}: {figure(row['there']['median'])} {row['unit']}",
            f"**{ratio['median']:.1f}** ({ratio['lower_quartile']:.1f} to {ratio['upper_quartile']:.1f})",
            f"{row['aim']:.3g}" if row["aim"] else "",
            row["beside"],
            f"`{row['command'].removeprefix('benchmarks/')}`",
            letters[place] + (f", {row['others']:.1f}" if is_busy(row) else ""),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_busy(row: dict[str, Any]) -> bool:
    return row.get("others", 0.0) > QUIET


def place_of(row: dict[str, Any]) -> str:
    """Return what a row was measured on, and in which seconds."""
    hardware = row["hardware"]
    return f"{hardware['device']}, {which_seconds(row['threads'])}, torch {hardware['packages']['torch']}"


def figure(value: float) -> str:
    """Return three digits of a figure."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the ratios on a logarithmic axis, with what was aimed at."""
    pyplot.rcParams["svg.hashsalt"] = "speed"  # the same figures make the same file
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.42 * len(rows)), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        ratio = row["ratio"]
        median = ratio["median"]
        colour = "#9aa7b4" if not row["aim"] else "#4878a8" if median >= row["aim"] else "#c8b48c"
        around = [[median - ratio["lower_quartile"]], [ratio["upper_quartile"] - median]]
        axes.barh(place, median, xerr=around, color=colour, height=0.6, capsize=2)
        if row["aim"]:
            axes.plot([row["aim"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        beyond = max(ratio["upper_quartile"], row["aim"] or 0)
        axes.annotate(f"  {median:.1f}", (beyond, place), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [f"{row['what']}, {row['ours']} / {row['peer']}" for row in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("peer / here (line: the aim; blue: reached)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
