"""Ratios that no change may lose: quick comparisons, with a wide margin for a machine that has other work."""

import pytest

from benchmarks import evaluation
from data.config import DataConfig


@pytest.mark.slow
def test_counting_ranks_stays_well_above_sorting() -> None:
    config = DataConfig(source="sample", sample_users=3000, sample_series=400)
    _, comparisons = evaluation.measure(config, repeats=5, quiet=False)
    ratios = {row["peer"]: row["ratio"]["median"] for row in comparisons if row["ours"] == "counting"}
    assert ratios["sorting"] > 3, f"ranks by counting are {ratios} times as fast as by sorting"
