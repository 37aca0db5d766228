"""What one causal pass over a history saves E4SRec, in training and in evaluation, against the published computation.

python benchmarks/e4srec.py            (a few minutes; writes the table of docs/results.md)

Published: one prompt a target in training, each with the whole instruction, one prompt a pass and an optimizer step
every 16; evaluation of one user at a time. A kinder reading passes the 16 together, sorted by length. Both are
restated here with the same backbone, weights and text; tests/parity/test_e4srec_forward.py holds them to published
numbers. Here, steps of 64 users are sorted as the training loader sorts them. All run alternately in one process of
one thread, and processor seconds are counted, so that other work matters little.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
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
from launch.loading import read_and_split, setting_of
from launch.methods import METHODS
from models.e4srec import E4SRec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "e4srec-cost.json"
BACKBONES = {"tiny": [], "minilm": ["--backbone.name=minilm", "--backbone.causal=true", "--backbone.adapter=none"]}
FLAGS = "--model e4srec --data.source amazon-beauty --method.input.source random --train.seed 0".split()
REPEATS = 5
STEP = {"published": 16, "here": 64}  # prompts of a published step, over all its processes; users of a step here
# Users of a round of training, and examples of a pass
TRAINED = {"published": (16, 1), "published, 16 prompts a pass": (64, 16), "here": (1024, 64)}
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
    def of(cls, flags: list[str]) -> "Contest":
        config = parse(flags)
        catalog, split = read_and_split(config.data)
        setting = setting_of(config, split, catalog)
        built = METHODS["e4srec"].build(setting)
        assert isinstance(built.model, E4SRec)
        tokenizer, settings = built.tokenizer, config.method.prompts
        assert tokenizer is not None

        def layout(mode: Literal["positions", "prefix"], shares_prefix: bool) -> ItemPromptLayout:
            own = replace(settings, mode=mode)
            return ItemPromptLayout.build(tokenizer, catalog, own, causal=True, shares_prefix=shares_prefix)

        return cls(built.model, split, layout("positions", True), layout("prefix", False), settings)

    def train(self, layout: ItemPromptLayout, step: int, micro_batch: int, users: np.ndarray) -> float:
        """Train on some users' every target, in the order of the training loader; return targets a processor second."""
        self.model.train()
        examples = TrainingItemPrompts(self.split, layout, replace(self.settings, max_targets=10**6))
        rows = np.flatnonzero(np.isin(examples.spans[:, 0], users))
        rows = rows[np.argsort(examples.lengths[rows], kind="stable")]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        began, targets = time.process_time(), 0
        for start in range(0, len(rows), step):
            batch_rows = rows[start : start + step]
            for first in range(0, len(batch_rows), micro_batch):
                batch = examples.collate(batch_rows[first : first + micro_batch], epoch=0)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = self.model(batch)
                (loss.total / step).backward()
                targets += loss.count
            optimizer.step()
            optimizer.zero_grad()
        return targets / (time.process_time() - began)

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
    """Return what was done in a second of each repeat, by each computation, in training and in evaluation."""
    contest = Contest.of([*FLAGS, *BACKBONES[backbone]])

    def training(random: np.random.Generator) -> dict[str, float]:
        speeds = {}
        for name, (users, micro_batch) in TRAINED.items():
            here = name == "here"
            layout = contest.every_position if here else contest.every_prefix
            chosen = random.choice(contest.split.num_users, users, replace=False)
            speeds[name] = contest.train(layout, STEP["here" if here else "published"], micro_batch, chosen)
        return speeds

    def evaluation(random: np.random.Generator) -> dict[str, float]:
        speeds = {}
        for name, layout in (("published", contest.every_prefix), ("here", contest.every_position)):
            users, batch_size = EVALUATED[name]
            cases = random.choice(contest.split.num_users, users, replace=False)
            speeds[name] = users / contest.evaluate(layout, batch_size, cases, grad=name == "published")
        return speeds

    return {"training, targets/s": repeated(training), "evaluation, users/s": repeated(evaluation)}


def repeated(measure_all: Callable[[np.random.Generator], dict[str, float]]) -> dict[str, list[float]]:
    """Measure all of them alternately, after a round to warm up."""
    rounds = [measure_all(np.random.default_rng(i)) for i in range(REPEATS + 1)][1:]
    return {name: [speeds[name] for speeds in rounds] for name in rounds[0]}


def markdown(measured: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Return the table of medians, spreads and ratios."""
    lines = ["| backbone | what | against | theirs | here | ratio |", "|" + " --- |" * 6]
    for backbone, cells in measured.items():
        for what, speeds in cells.items():
            here = speeds["here"]
            for name, theirs in speeds.items():
                if name == "here":
                    continue
                ratio = statistics.median(h / t for h, t in zip(here, theirs, strict=True))
                lines.append(f"| {backbone} | {what} | {name} | {spread(theirs)} | {spread(here)} | {ratio:.1f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
