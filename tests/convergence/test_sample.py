"""SASRec learns the planted structure of `sample`: near the best score there is, far above popularity."""

from pathlib import Path

import pytest

from data.config import DataConfig
from data.sample import sample_world
from data.sources import read
from data.splits import split
from tests.runs import results, run

# The next film follows from the last three, so short windows of the whole history teach most.
SETTINGS = (
    "--model sasrec --data.source sample --method.window 5 --method.windows all --method.dropout 0.3 "
    "--train.batch_size 256 --train.lr 0.003 --train.epochs 20 --train.eval_every_epochs 5 --train.precision fp32 "
    "--train.trackers []"
).split()


@pytest.mark.slow
def test_sasrec_comes_near_the_best_reachable_score(tmp_path: Path) -> None:
    finished = run(*SETTINGS, output=tmp_path / "run")
    assert finished.process.exitcode == 0, finished.text()
    config = DataConfig(source="sample")
    best_hr, best_ndcg = sample_world().best_scores(split(read(config), config))
    found = results(finished.folder)
    test, popularity = found["test"], found["popularity"]
    # Measured: .632 and .605 of .684 and .646. Knowing the sequel of the last film alone gives .58.
    assert 0.6 < test["HR@10"] <= best_hr
    assert 0.57 < test["NDCG@10"] <= best_ndcg
    assert popularity["HR@10"] < 0.15
    assert found["valid"]["HR@10"] > 0.55
