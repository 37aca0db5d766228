"""BIGRec's recommendations from one pass over the trie of titles, and from 20 beams inside it, beside the published
way: free generation of 128 tokens with 4 beams, whose best text is grounded by embedding distance.

make quickstart && python benchmarks/recommending.py --run runs/ml-100k-bigrec          (two minutes on two cores)

The same trained model ranks the whole catalogue for the same users in both ways, in turns; the published batch of
generation is 8 users. NDCG@10 is over all users of all turns, histories left out.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.contest import THREADS, Round, compare, keep, take_turns, timed
from evaluation.metrics import per_user_metrics
from evaluation.protocols import seen_pairs
from evaluation.ranks import count_ranks
from launch.loading import LoadedRun, load_run, read_data_of
from models.bigrec import BIGRec
from models.title_grounding import GroundingConfig

USERS = 16  # users of a turn
BATCHES = {"constrained": 16, "beam": 16, "generate": 8}
PUBLISHED = GroundingConfig(num_beams=4, max_new_tokens=128, beams="best", match="none")


class Ranking:
    """One way to score, which takes the next users in every turn."""

    def __init__(self, run: LoadedRun, way: str) -> None:
        assert isinstance(run.built.model, BIGRec)
        self.model, self.way, self.split = run.built.model, way, read_data_of(run)
        self.examples = run.built.require_full_ranking()(self.split, "test")
        self.order = np.random.default_rng(0).permutation(len(self.split.test))
        self.turn, self.ndcg = 0, np.empty(0)

    @torch.no_grad()
    def __call__(self) -> Round:
        rows = self.order[self.turn * USERS : (self.turn + 1) * USERS]
        self.turn, self.model.scoring = self.turn + 1, self.way
        for start in range(0, len(rows), BATCHES[self.way]):
            batch = rows[start : start + BATCHES[self.way]]
            scores = self.model.scores(self.examples.collate(batch, 0))  # type: ignore[arg-type]
            seen = map(torch.from_numpy, seen_pairs(self.split, "test", "full-history", batch))
            target = torch.from_numpy(self.split.target_items("test")[batch])
            greater, equal, _ = count_ranks(scores, target, *seen)
            found = per_user_metrics(greater.numpy(), equal.numpy(), (10,))["NDCG@10"]
            self.ndcg = np.append(self.ndcg, found)
        return {"NDCG@10": float(self.ndcg.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a trained run of bigrec")
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    run = load_run(arguments.run)
    assert isinstance(run.built.model, BIGRec)
    run.built.model.grounding.config = PUBLISHED
    ways = {"trie": "constrained", "beams": "beam", "generation": "generate"}
    rounds = take_turns({name: timed(Ranking(run, way)) for name, way in ways.items()}, arguments.repeats)
    quality = {name: played[-1]["NDCG@10"] for name, played in rounds.items()}
    comparisons = []
    for ours in ("trie", "beams"):
        beside = f"NDCG@10 {quality[ours]:.3f} and {quality['generation']:.3f}, {USERS * (arguments.repeats + 1)} users"
        what = f"BIGRec, ranking {USERS} users"
        comparisons.append(compare(rounds, what, ours, "generation", aim=10.0, beside=beside))
    settings = {"run": arguments.run.name, "published": asdict(PUBLISHED), "batches": BATCHES}
    keep("speed-recommending", "benchmarks/recommending.py", settings, rounds, comparisons)


if __name__ == "__main__":
    main()
