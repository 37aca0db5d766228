"""LlamaRec's ranking of a user's candidates in one pass against one prompt a candidate: users a second, side by side.

python benchmarks/llamarec.py          (two minutes on one thread; writes the table of docs/methods/llamarec.md)

Both rank the same candidates of the same users with the same weights, through the same code: all candidates lettered in
one prompt, whose last position scores them, or each alone behind the same history. They take turns, so both meet the
same machine.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.contest import spread
from benchmarks.document import hardware, write_section
from data.candidate_store import CandidateStore
from data.config import DataConfig
from data.identifiers import LETTERS, Identifiers, resolve
from data.ranking_batches import EvaluationRankings, RankingBatch
from data.ranking_prompts import RankingSettings, ranking_prompt, shown_titles
from data.ranking_tokens import RankingEncoder
from data.sources import read
from data.splits import Split, split
from models.backbone import Backbone, BackboneConfig, load_backbone, load_tokenizer
from models.llamarec import LlamaRec, LlamaRecConfig
from models.tiny import TinyConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "llamarec.json"
USERS, CANDIDATES, HISTORY = 4, 20, 20  # candidates and history as published
SHAPE = TinyConfig(hidden_size=256, layers=4, heads=8)
REPEATS = 7
GOAL = 5.0  # times as many users a second


def main() -> None:
    torch.set_num_threads(1)
    measured = measure()
    settings = {"users": USERS, "candidates": CANDIDATES, "history": HISTORY, "precision": "float32"}
    settings |= {"hidden_size": SHAPE.hidden_size, "layers": SHAPE.layers}
    report = {"hardware": hardware(), "settings": settings, "goal": GOAL, "measured": measured}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    write_section(ROOT / "docs" / "methods" / "llamarec.md", "benchmarks/llamarec.py", markdown(measured))
    print(markdown(measured))
    sys.exit(0 if measured["ratio"]["median"] >= GOAL else 1)


def measure() -> dict[str, Any]:
    """Return tokens, users a second and their ratio."""
    config = DataConfig(source="sample", sample_users=60, sample_series=60)
    interactions = read(config)
    parts, titles = split(interactions, config), ["", *interactions.catalog.titles[1:]]
    example = ranking_prompt(titles[1:3], [("A", titles[4])])
    tokenizer = load_tokenizer(BackboneConfig(), [*titles, example])
    shown = shown_titles(tokenizer, interactions.catalog, RankingSettings())
    backbone = load_backbone(BackboneConfig(tiny=SHAPE), tokenizer, seed=0, device="cpu", trainable=True)
    items = unseen_items(parts)
    together = Ranking(backbone, tokenizer, parts, shown, [items])
    alone = Ranking(backbone, tokenizer, parts, shown, [items[:, [place]] for place in range(CANDIDATES)])
    seconds: dict[str, list[float]] = {"one pass": [], "one prompt a candidate": []}
    for repeat in range(REPEATS + 1):
        for times, ranking in zip(seconds.values(), (together, alone), strict=True):
            started = time.perf_counter()
            scores = ranking()
            if repeat:  # the first round is not counted
                times.append(time.perf_counter() - started)
            assert scores.shape == (USERS, CANDIDATES)
    ratios = [slow / quick for quick, slow in zip(*seconds.values(), strict=True)]
    return {
        "tokens a user": {name: r.tokens // USERS for name, r in zip(seconds, (together, alone), strict=True)},
        "users a second": {name: spread([USERS / s for s in times]) for name, times in seconds.items()},
        "ratio": spread(ratios),
    }


def unseen_items(parts: Split) -> np.ndarray:
    """Random candidates of the users with the longest histories, [n, K]; rows of other users stay empty."""
    random, items = np.random.default_rng(0), np.zeros((len(parts.test), CANDIDATES), dtype=np.int32)
    for row in longest_histories(parts):
        history = parts.history(int(parts.test.user[row]), int(parts.test.position[row]))
        items[row] = random.permutation(np.setdiff1d(np.arange(1, parts.num_items + 1), history))[:CANDIDATES]
    return items


def longest_histories(parts: Split) -> np.ndarray:
    return np.argsort(-parts.test.position, kind="stable")[:USERS]


class Ranking:
    """Scores candidates of all users, [USERS, K]: those of a list together, one list after the other."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerFast,
        parts: Split,
        titles: list[str],
        lists: list[np.ndarray],
    ) -> None:
        count = lists[0].shape[1]
        letters = resolve(tokenizer, ranking_prompt(["a"], [("A", "b")]), LETTERS[:count])
        encoder = RankingEncoder(tokenizer, titles, HISTORY, Identifiers(LETTERS[:count], letters))
        config = LlamaRecConfig(prompts=RankingSettings(num_candidates=CANDIDATES, history_length=HISTORY))
        self.model = LlamaRec(config, backbone, parts.num_items, letters).eval()
        self.batches: list[RankingBatch] = []
        for items in lists:
            store = CandidateStore(items, np.zeros(items.shape, np.float32))
            examples = EvaluationRankings(parts, "test", encoder, config.prompts, 0, store)
            self.batches.append(examples.collate(longest_histories(parts)))
        self.tokens = sum(int(batch.attention_mask.sum()) for batch in self.batches)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return torch.cat([self.model.candidate_scores(batch) for batch in self.batches], dim=1)


def markdown(measured: dict[str, Any]) -> str:
    """Return tokens, speed and the ratio as a table."""
    lines = ["| candidates | tokens a user | users a second |", "| --- | --- | --- |"]
    for name, tokens in measured["tokens a user"].items():
        speed = measured["users a second"][name]
        quartiles = f"{speed['lower_quartile']:.2f} to {speed['upper_quartile']:.2f}"
        lines.append(f"| {name} | {tokens:,} | {speed['median']:.2f} ({quartiles}) |")
    where, ratio = hardware(), measured["ratio"]
    text = (
        f"{where['device']}, one thread, torch {where['packages']['torch']}, float32; {CANDIDATES} candidates, "
        f"{HISTORY} history items, {SHAPE.layers} layers {SHAPE.hidden_size} wide; medians (quartiles) of {REPEATS} "
        f"rounds. One pass ranks {ratio['median']:.1f} ({ratio['lower_quartile']:.1f} to "
        f"{ratio['upper_quartile']:.1f}) times as many users."
    )
    return "\n".join([text, "", *lines])


if __name__ == "__main__":
    main()
