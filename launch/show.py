"""What a person sees at the end of a run: the results beside popularity, and a few recommendations."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from data.interactions import Catalog
from data.splits import Split
from evaluation.results import Evaluation

from .run_folder import RunFolder

SHOWN_METRICS = ("HR@", "NDCG@", "MRR@")
SAME_AS_HR_AT_1 = ("NDCG@1", "MRR@1")
SHOWN_USERS, SHOWN_HISTORY, SHOWN_ITEMS = 3, 4, 5


def example_recommendations(test: Evaluation, split: Split, catalog: Catalog) -> list[dict[str, Any]]:
    """Return the recent history, the held-out title and the top titles of the first few test users."""
    examples = []
    for row, (user, position) in enumerate(zip(split.test.user, split.test.position, strict=True)):
        if row == SHOWN_USERS:
            break
        history = split.history(int(user), int(position))[-SHOWN_HISTORY:]
        examples.append(
            {
                "user": split.raw_users[user],
                "history": [catalog.titles[item] for item in history],
                "held_out": catalog.titles[test.ranks.target[row]],
                "recommended": [catalog.titles[item] for item in test.recommendations[row, :SHOWN_ITEMS] if item > 0],
            }
        )
    return examples


def show_results(folder: RunFolder) -> None:
    """Print a finished run's test figures beside popularity, then its example recommendations."""
    results = folder.results()
    console = Console(highlight=False)
    if "test" in results:
        title = f"{results['dataset']}, test, {_protocol(results)}"
        alone = {name: part["test"] for name, part in results.get("parts", {}).items()}
        console.print(figures(title, results["model"], results["test"], results["popularity"], alone))
    else:  # a stage, which ranks nothing
        table = _table(f"{results['dataset']}, held-out examples", results["model"])
        for metric, value in results["valid"].items():
            table.add_row(metric, f"{value:.4f}")
        console.print(table)
    if "two_stages" in results:
        console.print(stages(results["two_stages"]["test"], results["test"]))
    if "teacher" in results:
        console.print(beside_teacher(results["teacher"]))
    for example in results.get("examples", []):
        history = "; ".join(example["history"])
        console.print(f"\nuser {example['user']}, last: {history}", markup=False, soft_wrap=True)
        for place, recommended in enumerate(example["recommended"], start=1):
            mark = "  <- held out" if recommended == example["held_out"] else ""
            console.print(f"  {place}. {recommended}{mark}", markup=False)
    timing = results["timing"]
    console.print(f"\ntrained {timing['train_seconds']:.0f} s, {timing['total_seconds']:.0f} s in all. {folder.path}/")


def figures(
    title: str,
    model: str,
    measured: dict[str, Any],
    popularity: dict[str, Any],
    alone: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Table:
    """Return a table of HR, NDCG and MRR beside popularity, all in the form of `Evaluation.as_results`.

    Parts of the model that were measured `alone` have a column each, and, where the split has cold items, so have
    targets that are new, all others, and new ones ranked among each other.
    """
    slices = measured.get("slices", {})
    parts = [f"{name} alone" for name in alone]
    parts += [f"{name} ({part['targets']:,})" for name, part in slices.items()]
    columns = [*alone.values(), *slices.values()]
    table = _table(title, "popularity", model, "95 % interval", *parts)
    for metric in _shown(measured["intervals"]):
        low, high = measured["intervals"][metric]
        means = f"{popularity[metric]:.4f}", f"{measured[metric]:.4f}"
        table.add_row(metric, *means, f"{low:.4f} to {high:.4f}", *(f"{part[metric]:.4f}" for part in columns))
    return table


def stages(summary: dict[str, Any], measured: dict[str, Any]) -> Table:
    """Return a table of a ranking of candidates beside the retriever's own, for all users and for those it can help."""
    title = f"retrieved: {summary['recall']:.4f} of the targets are among {summary['candidates']} candidates"
    if "llm_weight" in summary:
        title += f"; weight of the language model {summary['llm_weight']:.2f}"
    found = f"{summary['users_found']:,} users with their target among them"
    table = _table(title, "retriever, all", "ranked, all", f"retriever, {found}", "ranked, the same")
    for metric in _shown(summary["subset"]):
        columns = summary["retriever"], measured, summary["retriever_subset"], summary["subset"]
        table.add_row(metric, *(f"{column[metric]:.4f}" for column in columns))
    return table


def beside_teacher(compared: dict[str, Any]) -> str:
    """Return a line on how a student compares with its teacher on validation."""
    ndcg, overlap = compared["NDCG@10"], next(name for name in compared if name.startswith("overlap@"))
    return (
        f"validation NDCG@10: teacher {ndcg['teacher']:.4f}, student {ndcg['student']:.4f}; {overlap} "
        f"{compared[overlap]:.4f}; the target stands higher with the teacher for {compared['teacher_better']:.1%} of "
        f"the users, with the student for {compared['student_better']:.1%}"
    )


def figures_of_draws(title: str, model: str, measured: dict[str, Any], popularity: dict[str, Any]) -> Table:
    """Return the same table of means over draws of candidates; both in the form of `over_draws`."""
    table = _table(title, "popularity", model, "spread", "each draw")
    for metric in _shown(measured["draws"][0]["intervals"]):
        each = " ".join(f"{draw[metric]:.4f}" for draw in measured["draws"])
        means = f"{popularity[metric]:.4f}", f"{measured[metric]:.4f}"
        table.add_row(metric, *means, f"{measured['spread'][metric]:.4f}", each)
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _shown(metrics: Iterable[str]) -> list[str]:
    """Return those metrics that a person is shown; "HR@10" may be called "sampled-100/HR@10"."""
    names = [(metric, metric.rpartition("/")[2]) for metric in metrics]
    return [metric for metric, name in names if name.startswith(SHOWN_METRICS) and name not in SAME_AS_HR_AT_1]


def _protocol(results: dict[str, Any]) -> str:
    header = results["header"]
    return (
        f"{header['protocol']} ranking of {header['catalog_size']:,} items, {header['users_evaluated']:,} users, "
        f"mask {header['mask']}, split {header['split_hash'][:12]}"
    )
