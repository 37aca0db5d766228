"""How time and memory grow with events and with items: preparation, a training step, and ranking.

python benchmarks/growth.py          (generated events; some minutes; writes the tables of docs/results.md)

SASRec, 64 wide, window 50, sampled softmax with 256 negatives. Each point is a process of its own, whose peak of memory
is that of the whole process; the exponent is the slope in logarithms over the three largest points.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.contest import PLAIN_LOOP, RESULTS, ROOT, THREADS, Contestant, Round, Turns, which_seconds

EVENTS = (100_000, 1_000_000, 10_000_000)  # with ITEMS[1] items
ITEMS = (1_000, 10_000, 100_000, 1_000_000)  # with EVENTS[1] events
EVENTS_A_USER, BATCH, STEPS, RANKED = 50, 64, 4, 256
MODEL = "--model sasrec --method.window 50 --method.hidden_size 64 --method.num_heads 1 --method.num_blocks 2".split()
LOSS = "--method.loss sampled-cross-entropy --method.num_negatives 256 --train.precision fp32".split()
STAGES = ("preparation", "training step", "ranking 256 users")
COMMAND = "benchmarks/growth.py"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    from benchmarks.document import hardware, write_section

    points = [(events, ITEMS[1]) for events in EVENTS] + [(EVENTS[1], items) for items in ITEMS]
    measured = [measure(events, items) for events, items in dict.fromkeys(points)]
    report = {"hardware": hardware(), "threads": THREADS, "points": measured}
    (RESULTS / "growth.json").write_text(json.dumps(report, indent=1) + "\n")
    write_section(ROOT / "docs" / "results.md", COMMAND, markdown(measured))
    print(markdown(measured))


def measure(events: int, items: int) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        contestant = Contestant([__file__, "worker", str(events), str(items), folder])
        point: dict[str, Any] = {"events": events, "items": items}
        for stage, name in enumerate(STAGES, start=1):
            contestant.round(stage)  # warms up
            played = contestant.round(stage)
            point[name] = {"seconds": played["seconds"] / played["times"], "peak_memory": played["peak_memory"]}
    print(point, flush=True)
    return point


def work(events: int, items: int, folder: Path) -> None:
    """Generate events, then do the stages, one a turn."""
    import numpy as np
    import torch

    from benchmarks.machine import train
    from benchmarks.training import make_trainer_of
    from data.batches import EvaluationSequences
    from data.sources import read
    from data.splits import split
    from evaluation.protocols import seen_pairs
    from evaluation.ranks import count_ranks
    from launch.config import parse
    from trainers.signals import Stop

    turns, random = Turns(), np.random.default_rng(0)
    named = np.concatenate([random.permutation(items), random.integers(items, size=max(0, events - items))]) + 1
    users = np.array_split(named[:events], events // EVENTS_A_USER)
    file = folder / "sequences.txt"
    file.write_text("".join(f"{user} {' '.join(map(str, row))}\n" for user, row in enumerate(users, start=1)))
    loop = [f"--data.source={file}", f"--output={folder / 'run'}", f"--train.batch_size={BATCH}"]
    flags = [*MODEL, *LOSS, *PLAIN_LOOP, *loop]
    config = parse(flags).data
    with Stop() as stop:
        trainer = make_trainer_of(flags, stop)
        taken = [step for _, step in zip(range(STEPS), trainer.loader.epoch(0), strict=False)]
        parts = split(read(config), config)
        cases = EvaluationSequences(parts, "test", 50)

        def prepare() -> Round:
            split(read(config), config)
            return {"times": 1}

        def steps() -> Round:
            trainer.model.train()
            train(trainer, taken)
            return {"times": len(taken)}

        @torch.no_grad()
        def rank() -> Round:
            trainer.model.eval()
            for rows in np.array_split(np.arange(min(RANKED, len(parts.test))), RANKED // 32):
                scores = trainer.model(cases.collate(rows))
                seen = map(torch.from_numpy, seen_pairs(parts, "test", "full-history", rows))
                count_ranks(scores, torch.from_numpy(parts.target_items("test")[rows]), *seen)
            return {"times": 1}

        stages = (prepare, steps, rank)
        turns.ready(items=parts.num_items)
        turns.serve(lambda stage: stages[stage - 1]())


def markdown(measured: list[dict[str, Any]]) -> str:
    """Return a table of all points, and the exponents."""
    lines = [
        f"{which_seconds(THREADS)}:",
        "",
        f"| events | items | {' | '.join(f'{stage}, s | peak GB' for stage in STAGES)} |",
        "|" + " --- |" * 8,
    ]
    for point in measured:
        cells = [f"{point[stage]['seconds']:.3g} | {point[stage]['peak_memory'] / 1e9:.2f}" for stage in STAGES]
        lines.append(f"| {point['events']:,} | {point['items']:,} | {' | '.join(cells)} |")
    slopes = []
    for axis, other in (("events", ("items", ITEMS[1])), ("items", ("events", EVENTS[1]))):
        along = sorted((p for p in measured if p[other[0]] == other[1]), key=lambda p: p[axis])[-3:]
        found = ", ".join(f"{stage} {slope([p[axis] for p in along], along, stage):.2f}" for stage in STAGES)
        slopes.append(f"Exponents of {axis}: {found}.")
    return "\n".join([*lines, "", *slopes])


def slope(sizes: list[int], points: list[dict[str, Any]], stage: str) -> float:
    """Return the slope of time over size, both in logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(point[stage]["seconds"]) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
