"""The report's figures, as PNG bytes, each for a light and a dark page."""

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .run_folders import Run, popularity_of

Theme = Literal["light", "dark"]

# Eight hues that stay apart for colour-blind readers, in a darker and a lighter set.
_COLORS: dict[Theme, list[str]] = {
    "light": ["#2f6fde", "#d1572a", "#1b8f6b", "#9a4fc9", "#b8860b", "#c2327c", "#4a7f99", "#6b6b6b"],
    "dark": ["#7aa7ff", "#ff9166", "#4fd0a5", "#c892f0", "#e6b84a", "#ff7fbb", "#86bfd8", "#b5b5b5"],
}
_INK: dict[Theme, str] = {"light": "#1d2330", "dark": "#e4e8f0"}
_FAINT: dict[Theme, str] = {"light": "#d9dee8", "dark": "#39414f"}
_PAPER: dict[Theme, str] = {"light": "#ffffff", "dark": "#161b22"}
_LONG_CURVE = 200  # points from which a curve is smoothed


def learning_curves(runs: Sequence[Run], metric: str, theme: Theme = "light") -> bytes:
    """Training loss, learning rate and validation `metric` over steps, one line a run."""
    with style.context(_style(theme)):
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        panels = figure.subplots(1, 3)
        for run, color in zip(runs, _colors(theme, len(runs)), strict=True):
            _curve(panels[0], run.training, "loss", run.name, color, smooth=True)
            _curve(panels[1], run.training, "lr", run.name, color)
            _curve(panels[2], run.validation, f"valid/{metric}", run.name, color, marker="o")
        for panel, title in zip(panels, ("training loss", "learning rate", f"validation {metric}"), strict=True):
            panel.set_title(title, loc="left")
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panels[1].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))
        return _png(figure)


def comparison(runs: Sequence[Run], metrics: Sequence[str], theme: Theme = "light") -> bytes:
    """One panel a metric: a bar a run with its 95 % interval, and popularity as a dashed line."""
    with style.context(_style(theme)):
        figure = Figure(figsize=(12, 1.3 + 0.42 * len(runs)), layout="constrained")
        panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            _bars(panel, runs, metric, theme)
        panels[0].set_yticks(range(len(runs)), [run.name for run in runs])
        panels[0].set_ylim(len(runs) - 0.4, -0.6)  # the first run on top; one run alone keeps a slim bar
        return _png(figure)


def _bars(panel: Axes, runs: Sequence[Run], metric: str, theme: Theme) -> None:
    tests = [run.results["test"] for run in runs]
    values = np.array([test.get(metric) for test in tests], dtype=float)  # None, absent, becomes NaN: no bar
    intervals = np.array([test.get("intervals", {}).get(metric, (np.nan, np.nan)) for test in tests])
    places = np.arange(len(runs))
    panel.barh(places, values, height=0.62, color=_colors(theme, len(runs)))
    widths = np.abs(intervals - values[:, None]).T
    panel.errorbar(values, places, xerr=widths, fmt="none", ecolor=_INK[theme], elinewidth=1.2, capsize=3)
    popularity = popularity_of(runs).get(metric)
    if popularity is not None:
        panel.axvline(popularity, color=_INK[theme], linestyle=(0, (4, 3)), linewidth=1)
        panel.text(
            popularity,
            1.01,
            f" popularity {popularity:.4f}",
            transform=panel.get_xaxis_transform(),
            fontsize=8.5,
        )
    panel.set_xlim(left=0)
    panel.grid(axis="y", visible=False)
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel(f"test {metric}, 95 % interval")


def _curve(
    panel: Axes,
    lines: list[dict[str, Any]],
    key: str,
    label: str,
    color: str,
    smooth: bool = False,
    marker: str = "",
) -> None:
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float) and "step" in line]
    if not points:
        panel.plot([], [], color=color, label=label)  # keeps its place in the legend
        return
    steps, values = np.array(points, dtype=float).T
    if smooth and len(values) > _LONG_CURVE:
        panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        window = len(values) // 50
        values = np.convolve(values, np.ones(window) / window, mode="valid")
        steps = steps[window - 1 :]
    panel.plot(steps, values, color=color, label=label, marker=marker, markersize=3.5)


def _colors(theme: Theme, count: int) -> list[str]:
    palette = _COLORS[theme]
    return [palette[index % len(palette)] for index in range(count)]


def _style(theme: Theme) -> dict[str, Any]:
    ink, faint, paper = _INK[theme], _FAINT[theme], _PAPER[theme]
    return {
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.facecolor": paper,
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": faint,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.7,
        "text.color": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "font.size": 9.5,
        "legend.frameon": False,
    }


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
