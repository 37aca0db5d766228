"""Ranking every user over the whole catalogue by counting, beside sorting: the same scores, mask and metrics.

python benchmarks/evaluation.py          (MovieLens 1M's users and items; some seconds)

Scores are drawn at random before the clock starts. Both leave out each history, find the place of each target and
compute metrics; the peers do what published code does: they sort each row and look the target up, or sort twice
(BIGRec's and SASRec's `argsort().argsort()`). `all of it` is what the evaluator does besides: it keeps the ten best
items, and draws bootstrap intervals.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import THREADS, Round, compare, keep, take_turns, timed
from data.config import DataConfig
from data.sources import read
from data.splits import Split, split
from evaluation.evaluator import Evaluator
from evaluation.metrics import per_user_metrics
from evaluation.protocols import seen_pairs
from evaluation.ranks import count_ranks

BATCH = 256
CUTOFFS = (1, 5, 10, 20)


class Rows(NamedTuple):
    """All that the evaluator asks of a batch."""

    row: Tensor


class Contest:
    """One split and its scores, ranked in two ways."""

    def __init__(self, config: DataConfig) -> None:
        self.split: Split = split(read(config), config)
        users, items = len(self.split.test), self.split.num_items
        self.scores = torch.rand((users, items + 1), generator=torch.Generator().manual_seed(0))
        self.target = torch.from_numpy(self.split.target_items("test"))
        self.evaluator = Evaluator(self.split, "test", cutoffs=CUTOFFS)

    def batches(self) -> Iterator[Rows]:
        return map(Rows, torch.arange(len(self.scores)).split(BATCH))

    def seen(self, batch: Rows) -> tuple[Tensor, Tensor]:
        rows, items = seen_pairs(self.split, "test", "full-history", batch.row.numpy())
        return torch.from_numpy(rows), torch.from_numpy(items)

    def evaluate(self) -> Round:
        evaluation = self.evaluator.run(lambda batch: self.scores[batch.row], self.batches())
        return {"NDCG@10": evaluation.metrics["NDCG@10"]}

    def count(self) -> Round:
        counts = []
        for batch in self.batches():
            counts.append(count_ranks(self.scores[batch.row], self.target[batch.row], *self.seen(batch)))
        greater, equal, _ = (torch.cat(column).numpy() for column in zip(*counts, strict=True))
        return {"NDCG@10": float(per_user_metrics(greater, equal, CUTOFFS)["NDCG@10"].mean())}

    def sort(self) -> Round:
        places = []
        for batch in self.batches():
            order = self.left(batch).argsort(dim=1, descending=True)
            places.append((order == self.target[batch.row, None]).int().argmax(dim=1))
        return self.of_places(torch.cat(places))

    def sort_twice(self) -> Round:
        places = []
        for batch in self.batches():
            place_of_item = self.left(batch).argsort(dim=1, descending=True).argsort(dim=1)
            places.append(place_of_item.gather(1, self.target[batch.row, None])[:, 0])
        return self.of_places(torch.cat(places))

    def left(self, batch: Rows) -> Tensor:
        """Return scores that leave out the history."""
        scores, target_B1 = self.scores[batch.row], self.target[batch.row, None]
        own = scores.gather(1, target_B1)
        scores[self.seen(batch)] = -torch.inf
        scores[:, 0] = -torch.inf
        return scores.scatter_(1, target_B1, own)

    def of_places(self, place: Tensor) -> Round:
        per_user = per_user_metrics(place.numpy(), np.zeros(len(place), np.int64), CUTOFFS)
        return {"NDCG@10": float(per_user["NDCG@10"].mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    torch.set_num_threads(THREADS)
    rounds, comparisons = measure(DataConfig(source="ml-1m", item_core=5), parser.parse_args().repeats)
    keep("speed-evaluation", "benchmarks/evaluation.py", {"batch": BATCH}, rounds, comparisons)


def measure(config: DataConfig, repeats: int) -> tuple[dict[str, list[Round]], list[dict[str, Any]]]:
    """Return the rounds of all, and how they compare; raise where they disagree."""
    contest = Contest(config)
    ways = {"counting": contest.count, "all of it": contest.evaluate}
    ways |= {"sorting": contest.sort, "sorting twice": contest.sort_twice}
    rounds = take_turns({name: timed(way) for name, way in ways.items()}, repeats)
    found = {name: played[-1]["NDCG@10"] for name, played in rounds.items()}
    if max(found.values()) - min(found.values()) > 1e-9:
        raise AssertionError(f"the ways disagree about NDCG@10: {found}")
    what = f"ranking {len(contest.scores):,} users over {contest.split.num_items:,} items"
    return rounds, [
        compare(rounds, what, "counting", "sorting", aim=10.0, beside="same NDCG@10"),
        compare(rounds, what, "counting", "sorting twice", aim=10.0, beside="same NDCG@10"),
        compare(rounds, what, "all of it", "sorting twice", aim=None, beside="with intervals and the best ten"),
    ]


if __name__ == "__main__":
    main()
