"""Bootstrap intervals and paired tests against scipy and against what must be refused."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from evaluation.metrics import per_user_metrics
from evaluation.ranks import Ranks
from evaluation.results import Evaluation, write_ranks
from evaluation.significance import bootstrap_intervals, compare_runs

USERS = 400
HEADER = {"split_hash": "a" * 64, "phase": "test", "protocol": "full", "mask": "none", "ties": "expected"}


def write_run(path: Path, greater: np.ndarray, **header: str) -> Path:
    users = np.arange(len(greater))
    ranks = Ranks(users, users, users + 1, greater, np.zeros_like(users), np.full_like(users, 1000))
    raw_users = tuple(f"u{user}" for user in users)
    recommendations = np.zeros((len(users), 10), dtype=np.int64)
    evaluation = Evaluation({}, {}, ranks, recommendations, {**HEADER, **header}, raw_users)
    write_ranks(evaluation, path)
    return path


@pytest.fixture
def greater() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, USERS)


def test_a_better_run_is_found_better(tmp_path: Path, greater: np.ndarray) -> None:
    a = write_run(tmp_path / "a.parquet", greater)
    b = write_run(tmp_path / "b.parquet", np.maximum(greater - 6, 0))
    hit_rate, ndcg = compare_runs(a, b)
    assert (hit_rate.metric, ndcg.metric) == ("HR@10", "NDCG@10")
    for result in (hit_rate, ndcg):
        assert result.difference == pytest.approx(result.mean_b - result.mean_a)
        assert 0 < result.interval[0] < result.difference < result.interval[1]
        assert result.p_value < 0.001
        assert result.num_users == USERS
    assert compare_runs(b, a)[0].difference == -hit_rate.difference


def test_p_value_is_close_to_the_t_test(tmp_path: Path, greater: np.ndarray) -> None:
    other = greater.copy()
    changed = np.random.default_rng(1).choice(USERS, 60, replace=False)
    other[changed] = np.random.default_rng(2).integers(0, 33, 60)
    a, b = write_run(tmp_path / "a.parquet", greater), write_run(tmp_path / "b.parquet", other)
    [result] = compare_runs(a, b, ["NDCG@10"])
    metrics = [per_user_metrics(counts, np.zeros_like(counts), [10])["NDCG@10"] for counts in (greater, other)]
    expected = ttest_rel(*metrics).pvalue
    assert 0.001 < expected < 0.9, "the case should be neither hopeless nor obvious"
    assert result.p_value == pytest.approx(expected, abs=0.02)


def test_many_users_get_the_same_p_value_from_the_t_test(
    tmp_path: Path, greater: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_run(tmp_path / "a.parquet", greater)
    b = write_run(tmp_path / "b.parquet", np.roll(greater, 1))
    [by_permutation] = compare_runs(a, b, ["NDCG@10"])
    monkeypatch.setattr("evaluation.significance._MANY_USERS", USERS - 1)
    [by_t_test] = compare_runs(a, b, ["NDCG@10"])
    assert by_t_test.p_value != by_permutation.p_value
    assert by_t_test.p_value == pytest.approx(by_permutation.p_value, abs=0.02)


def test_several_seeds_count_as_their_mean_for_each_user(tmp_path: Path, greater: np.ndarray) -> None:
    random = np.random.default_rng(4)
    a, b = (
        [write_run(tmp_path / f"{name}{seed}.parquet", random.permutation(greater) - gain) for seed in range(3)]
        for name, gain in (("a", 0), ("b", -2))
    )
    [together] = compare_runs(a, b, ["NDCG@10"])
    alone = [compare_runs(*pair, ["NDCG@10"])[0] for pair in zip(a, b, strict=True)]
    assert together.mean_a == pytest.approx(np.mean([one.mean_a for one in alone]))
    assert together.difference == pytest.approx(np.mean([one.difference for one in alone]))
    width = together.interval[1] - together.interval[0]
    assert width < 0.75 * min(one.interval[1] - one.interval[0] for one in alone), "noise of seeds averages out"
    [nothing] = compare_runs([a[0]] * 2, [a[0]], ["NDCG@10"])
    assert (nothing.difference, nothing.p_value) == (0, 1)
    with pytest.raises(ValueError, match="no run on one side"):
        compare_runs(a, [])
    [one_side] = compare_runs(a, b[0], ["NDCG@10"])
    assert (one_side.mean_a, one_side.mean_b) == pytest.approx((together.mean_a, alone[0].mean_b))


def test_equal_runs_do_not_differ(tmp_path: Path, greater: np.ndarray) -> None:
    a, b = write_run(tmp_path / "a.parquet", greater), write_run(tmp_path / "b.parquet", greater)
    [result] = compare_runs(a, b, ["HR@10"])
    assert (result.difference, result.interval, result.p_value) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize(("entry", "value"), [("split_hash", "b" * 64), ("mask", "train"), ("protocol", "sampled-100")])
def test_runs_that_do_not_compare_are_refused(tmp_path: Path, greater: np.ndarray, entry: str, value: str) -> None:
    a = write_run(tmp_path / "a.parquet", greater)
    b = write_run(tmp_path / "b.parquet", greater, **{entry: value})
    with pytest.raises(ValueError, match=f"do not compare: {entry} is '{HEADER[entry]}' and '{value}'"):
        compare_runs(a, b)
    with pytest.raises(ValueError, match=f"do not compare: {entry}"):
        compare_runs([a, b], a)


def test_other_targets_under_the_same_hash_are_refused(tmp_path: Path, greater: np.ndarray) -> None:
    a = write_run(tmp_path / "a.parquet", greater)
    b = write_run(tmp_path / "b.parquet", greater[:-1])
    with pytest.raises(ValueError, match="not the same users and targets"):
        compare_runs(a, b)


def test_a_file_without_header_is_refused(tmp_path: Path, greater: np.ndarray) -> None:
    import pyarrow.parquet as parquet

    a = write_run(tmp_path / "a.parquet", greater)
    parquet.write_table(parquet.read_table(a).replace_schema_metadata(None), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="no evaluation header"):
        compare_runs(a, tmp_path / "b.parquet")


def test_bootstrap_intervals_cover_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_intervals({"HR@10": (rng.random(300) < 0.3).astype(float)}, seed, 400)["HR@10"]
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def test_bootstrap_is_seeded_and_does_not_depend_on_the_order_of_sums() -> None:
    values = np.random.default_rng(0).random(5000)
    first = bootstrap_intervals({"a": values, "b": values / 3}, seed=1)
    assert first == bootstrap_intervals({"b": values / 3, "a": values}, seed=1)
    assert first != bootstrap_intervals({"a": values, "b": values / 3}, seed=2)
