"""BIGRec on generated data whose best reachable score is known."""

import json
from pathlib import Path

import pytest

from launch.train import main


@pytest.mark.slow
def test_bigrec_learns_the_planted_series(tmp_path: Path) -> None:
    """Best reachable HR@10 is .684 and popularity reaches .10 (data/sample.py): a broken model cannot pass .55."""
    arguments = "--model bigrec --data.source sample --train.epochs 5 --train.batch_size 32 --train.trackers []"
    folder = tmp_path / "run"
    assert main([*arguments.split(), "--data.cache", str(tmp_path), "--output", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["popularity"]["HR@10"] < 0.15
    assert 0.55 < results["test"]["HR@10"] < 0.72
