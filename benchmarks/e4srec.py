"""What one causal pass over a history saves E4SRec, in training and in evaluation, against the published computation.

python benchmarks/e4srec.py            (a few minutes; writes the table of docs/results.md)

Published: one prompt a target in training, each with the whole instruction; evaluation of one user at a time. It is
restated here with the same backbone, weights and text; tests/parity/test_e4srec_forward.py holds it to published
numbers. Both run alternately in one process of one thread, and processor seconds are counted, so that other work does
not matter.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.document import hardware, write_section
from data.item_examples import EvaluationItemPrompts, TrainingItemPrompts
from data.item_prompts import ItemPromptLayout, ItemPromptSettings
from data.splits import Split
from launch.config import parse
from launch.loading import load_model, read_and_split
from launch.methods import METHODS
from launch.setting import Setting
from models.e4srec import E4SRec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "e4srec-cost.json"
BACKBONES = {"tiny": [], "minilm": ["--backbone.name=minilm", "--backbone.causal=true", "--backbone.adapter=none"]}
FLAGS = "--model e4srec --data.source amazon-beauty --method.input.source random --train.seed 0".split()
REPEATS = 5
USERS = 64  # a round of training
PUBLISHED_BATCH = 16  # prompts of a published step, over all its processes
EVALUATED = {"published": (8, 1), "here": (4096, 256)}  # users of a round of evaluation, and of a pass


@dataclass(frozen=True)
class Contest:
    """One model, and the data that both computations read."""

    model: E4SRec
    split: Split
    every_position: ItemPromptLayout
    every_prefix: ItemPromptLayout
    settings: ItemPromptSettings

    @classmethod
    def of(cls, backbone: str) -> "Contest":
        config = parse([*FLAGS, *BACKBONES[backbone]])
        interactions, split = read_and_split(config.data)
        setting = Setting(
            split, interactions.catalog, config.method, config.backbone, 0, config.data.cache_folder, load_model
        )
        built = METHODS["e4srec"].build(setting)
        assert isinstance(built.model, E4SRec)
        tokenizer, settings = built.tokenizer, config.method.prompts
        assert tokenizer is not None

        def layout(mode: Literal["positions", "prefix"], shares_prefix: bool) -> ItemPromptLayout:
            own = replace(settings, mode=mode)
            return ItemPromptLayout.build(
                tokenizer, interactions.catalog, own, causal=True, shares_prefix=shares_prefix
            )

        return cls(built.model, split, layout("positions", True), layout("prefix", False), settings)

    def train(self, layout: ItemPromptLayout, batch_size: int, users: np.ndarray) -> tuple[float, int]:
        """Train on some users' every target; return the processor seconds and the number of targets."""
        self.model.train()
        examples = TrainingItemPrompts(self.split, layout, replace(self.settings, max_targets=10**6))
        rows = np.flatnonzero(np.isin(examples.spans[:, 0], users))
        rows = rows[np.argsort(examples.lengths[rows], kind="stable")]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        seconds, targets = 0.0, 0
        for start in range(0, len(rows), batch_size):
            began = time.process_time()
            batch = examples.collate(rows[start : start + batch_size], epoch=0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.model(batch)
            (loss.total / loss.count).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds, targets = seconds + time.process_time() - began, targets + loss.count
        return seconds, targets

    def evaluate(self, layout: ItemPromptLayout, batch_size: int, cases: np.ndarray, grad: bool) -> float:
        """Score the catalogue for some users; return the processor seconds. The published loop records gradients."""
        self.model.eval()
        examples = EvaluationItemPrompts(self.split, "test", layout, self.settings.max_history)
        cases = cases[np.argsort(examples.lengths[cases], kind="stable")]
        began = time.process_time()
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
            for start in range(0, len(cases), batch_size):
                self.model(examples.collate(cases[start : start + batch_size]))
        return time.process_time() - began


def main() -> None:
    torch.set_num_threads(1)
    measured = {backbone: measure(backbone) for backbone in BACKBONES}
    RESULTS.write_text(json.dumps({"hardware": hardware(), "flags": FLAGS, "cells": measured}, indent=1) + "\n")
    write_section(ROOT / "docs" / "results.md", "benchmarks/e4srec.py", markdown(measured))
    print(markdown(measured))


def measure(backbone: str) -> dict[str, dict[str, list[float]]]:
    """Return users a second of each repeat, published and here, of training and of evaluation."""
    contest = Contest.of(backbone)

    def training(random: np.random.Generator) -> Iterator[float]:
        users = random.choice(contest.split.num_users, USERS, replace=False)
        published, targets = contest.train(contest.every_prefix, PUBLISHED_BATCH, users)
        here, same = contest.train(contest.every_position, USERS, users)
        assert targets == same
        yield from (USERS / published, USERS / here)

    def evaluation(random: np.random.Generator) -> Iterator[float]:
        for name, layout in (("published", contest.every_prefix), ("here", contest.every_position)):
            users, batch_size = EVALUATED[name]
            cases = random.choice(contest.split.num_users, users, replace=False)
            yield users / contest.evaluate(layout, batch_size, cases, grad=name == "published")

    return {"training": repeated(training), "evaluation": repeated(evaluation)}


def repeated(measure_both: Callable[[np.random.Generator], Iterator[float]]) -> dict[str, list[float]]:
    """Measure both alternately, after a round to warm up."""
    pairs = [tuple(measure_both(np.random.default_rng(i))) for i in range(REPEATS + 1)][1:]
    published, here = zip(*pairs, strict=True)
    return {"published": list(published), "here": list(here)}


def markdown(measured: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Return the table of medians, spreads and ratios."""
    lines = ["| backbone | what | published, users/s | here, users/s | ratio |", "|" + " --- |" * 5]
    for backbone, cells in measured.items():
        for what, speeds in cells.items():
            ratio = statistics.median(h / p for h, p in zip(speeds["here"], speeds["published"], strict=True))
            lines.append(
                f"| {backbone} | {what} | {spread(speeds['published'])} | {spread(speeds['here'])} | {ratio:.1f} |"
            )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
