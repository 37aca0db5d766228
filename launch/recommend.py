"""Recommend from a finished run, for titles that are typed or for a user of its data set.

python launch/recommend.py --run runs/NAME --history "Heat (1995)" "Fargo (1996)" -k 10
python launch/recommend.py --run runs/NAME --user 42 --new_items titles.txt
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the clone itself is importable, installed or not

import numpy as np
import torch
from rapidfuzz import fuzz, process, utils
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.interactions import Catalog
from data.new_items import with_new_items
from launch.loading import LoadedRun, histories_as_split, load_run, read_data_of
from launch.setting import CannotRank
from models.devices import own_device

# How like a title (0 to 100) a typed one must be to be taken for it, or to be told of it; a part counts for less.
SURE_MATCH, POSSIBLE_MATCH, PART_OF_WHOLE = 85, 60, 0.8
YEAR, NUMBER, ARTICLE = re.compile(r"\s*\(\d{4}\)$"), re.compile(r"\d+|\b[ivx]+\b"), re.compile(r"\b(the|a|an)\b")


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    run = trained = load_run(arguments.run)
    if arguments.new_items is not None:
        run = add_new_items(trained, arguments.new_items)
    if arguments.history:
        history = match_titles(arguments.history, run.catalog)
    else:
        history = history_of_user(arguments.user, trained)
    try:
        items, scores = recommend(run, history, arguments.k, arguments.include_seen)
    except CannotRank as error:
        sys.exit(f"error: --run {arguments.run}: {error}")
    if arguments.json:
        rows = [
            {"title": run.catalog.titles[i], "item": run.catalog.raw_ids[i], "score": round(float(s), 6)}
            for i, s in zip(items, scores, strict=True)
        ]
        watched = [run.catalog.titles[i] for i in history]
        print(json.dumps({"history": watched, "recommended": rows}, indent=1, ensure_ascii=False))
    else:
        show(run.catalog, history, items, scores)
    return 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/recommend.py", description="Recommend from a finished run.")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--history", nargs="+", metavar="TITLE", help="titles, oldest first; small misspellings are fine")
    who.add_argument("--user", help="raw id of a user of the run's data set")
    parser.add_argument("-k", type=int, default=10, help="how many items, at least 1 (10)")
    parser.add_argument(
        "--new_items",
        type=Path,
        metavar="FILE",
        help="items that the run has not met: a title a line, or a .csv file with a column title (item, categories)",
    )
    parser.add_argument("--include_seen", action="store_true", help="let items of the history be recommended again")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.k < 1:
        parser.error(f"-k {arguments.k}: expected at least 1")
    return arguments


def add_new_items(run: LoadedRun, file: Path) -> LoadedRun:
    """Return the run with more items in its catalogue; exit where its model knows items by their ids."""
    if run.built.add_items is None:
        sys.exit(
            f"error: --run {run.folder.path} is {run.config.model}, which learns an item from its interactions: "
            "--new_items needs a run of dense-retrieval"
        )
    try:
        catalog = with_new_items(run.catalog, file)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --new_items: {error}")
    run.built.add_items(catalog)
    return replace(run, catalog=catalog)


def match_titles(typed: list[str], catalog: Catalog) -> np.ndarray:
    """Return the item of each typed title; exit naming all that the catalogue does not have, or not only once."""
    items, mistakes = [], []
    for text in typed:
        found, close = items_named(text, catalog)
        titles = dict.fromkeys(catalog.titles[item] for item in found)  # equal titles cannot be told apart
        if len(titles) == 1:
            items.append(found[0])
        elif titles:
            mistakes.append(f'"{text}" could be {" or ".join(titles)}')
        else:
            hint = f" (closest: {'; '.join(catalog.titles[item] for item in close)})" if close else ""
            mistakes.append(f'"{text}" is unknown{hint}')
    if mistakes:
        sys.exit(f"error: in the catalogue of {catalog.num_items:,} titles {', and '.join(mistakes)}")
    return np.array(items, dtype=np.int64)


def items_named(text: str, catalog: Catalog) -> tuple[list[int], list[int]]:
    """Return the items that a text names, or none and the closest few.

    Case, punctuation, order of words, English articles, the year and a few letters may be wrong or missing, numbers
    may not: "Toy Story 2" is not "Toy Story". Where titles are mere ids, only the same one will do.
    """
    titles = catalog.titles[1:]
    if text in titles:
        return [titles.index(text) + 1], []
    if not catalog.has_titles:
        return [], []
    numbers = set(NUMBER.findall(text.lower()))
    has_numbers = np.array([numbers <= set(NUMBER.findall(title.lower())) for title in titles])
    whole, part = likeness(text, titles)
    best = (whole * has_numbers).max()
    if best >= SURE_MATCH:
        return [int(i) + 1 for i in np.flatnonzero(whole * has_numbers == best)], []
    near = np.maximum(whole, part)
    return [], [int(i) + 1 for i in np.argsort(-near, kind="stable")[:3] if near[i] >= POSSIBLE_MATCH]


def likeness(text: str, titles: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return how like a text each title is, and how like the part of it that is, both [N] and 0 to 100."""
    words = words_of(text)
    forms = [*map(words_of, titles), *(words_of(YEAR.sub("", title)) for title in titles)]
    ratio, any_order, part = (
        process.cdist([words], forms, scorer=scorer).reshape(2, -1).max(axis=0)
        for scorer in (fuzz.ratio, fuzz.token_sort_ratio, fuzz.partial_ratio)
    )
    longer = np.array([len(YEAR.sub("", title)) >= len(words) for title in titles])
    return np.maximum(ratio, any_order), PART_OF_WHOLE * part * longer


def words_of(title: str) -> str:
    """Return a title in lower case without punctuation and articles."""
    return " ".join(ARTICLE.sub(" ", utils.default_process(title)).split())


def history_of_user(raw_user: str, run: LoadedRun) -> np.ndarray:
    """Return every event of a user of the run's data set, oldest first."""
    parts = read_data_of(run)
    if raw_user not in parts.raw_users:
        close, *_ = process.extractOne(raw_user, parts.raw_users, scorer=fuzz.ratio)
        sys.exit(f"error: --user {raw_user} is not one of the {parts.num_users:,} users (did you mean {close}?)")
    user = parts.raw_users.index(raw_user)
    return parts.items[parts.offsets[user] : parts.offsets[user + 1]]


@torch.inference_mode()
def recommend(run: LoadedRun, history: np.ndarray, k: int, include_seen: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best items and their scores, best first."""
    examples = run.built.evaluation_among(histories_as_split([history], run.catalog), "test", None)
    device = own_device()
    scores = run.built.model.to(device)(examples.collate(np.array([0]), 0).to(device))[0].cpu()
    if not include_seen:
        scores[torch.from_numpy(history)] = -torch.inf
    best = scores.topk(min(k, run.catalog.num_items))
    kept = best.values > -torch.inf
    return best.indices[kept].numpy(), best.values[kept].numpy()


def show(catalog: Catalog, history: np.ndarray, items: np.ndarray, scores: np.ndarray) -> None:
    console = Console(highlight=False)
    recent = "; ".join(catalog.titles[i] for i in history[-5:])
    console.print(f"after {'... ' if len(history) > 5 else ''}{recent}", markup=False, soft_wrap=True)
    table = Table()
    for heading in ("", "title", "categories", "score"):
        table.add_column(heading, justify="right" if heading in ("", "score") else "left")
    for place, (item, score) in enumerate(zip(items, scores, strict=True), start=1):
        categories = ", ".join(catalog.categories[item])
        table.add_row(str(place), escape(catalog.titles[item]), escape(categories), f"{score:.3f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
