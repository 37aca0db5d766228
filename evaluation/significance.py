"""How sure a figure is: bootstrap intervals over users, and paired tests of two runs on the same users."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .metrics import per_user_metrics
from .results import RankFile, read_ranks

CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap at about 32 MB
_GRID = 2.0**30  # metrics are rounded to 1e-9 so that sums are exact and do not depend on the number of threads
_MANY_USERS = 20_000  # from here on the paired t-test gives the same p-value, and at once instead of in minutes
# Two rank files are comparable when these entries of their headers agree.
_MUST_AGREE = ("split_hash", "phase", "protocol", "mask", "ties", "candidates_hash")


@dataclass(frozen=True)
class PairedDifference:
    """Run B minus run A on the same users."""

    metric: str
    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float]  # 95 % bootstrap over users
    p_value: float  # two-sided paired permutation test
    num_users: int


def bootstrap_intervals(
    per_user: dict[str, np.ndarray], seed: int, resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of the mean of each metric ([n] values), by drawing users with replacement."""
    distinct = {id(values): values for values in per_user.values()}  # HR and Recall are one array with one target
    values_UM = np.round(np.stack(list(distinct.values()), axis=1) * _GRID) / _GRID
    num_users = len(values_UM)
    generator = np.random.default_rng(seed)
    means_RM = np.empty((resamples, len(distinct)))
    at_once = max(1, _DRAWS_AT_ONCE // num_users)
    for start in range(0, resamples, at_once):
        num_draws = min(at_once, resamples - start)
        drawn = generator.integers(num_users, size=(num_draws, num_users))
        drawn += np.arange(num_draws)[:, None] * num_users
        times_RU = np.bincount(drawn.ravel(), minlength=num_draws * num_users).reshape(num_draws, num_users)
        means_RM[start : start + num_draws] = times_RU.astype(np.float64) @ values_UM / num_users

    low_M, high_M = np.quantile(means_RM, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    column = {key: index for index, key in enumerate(distinct)}
    return {
        name: (float(low_M[column[id(values)]]), float(high_M[column[id(values)]])) for name, values in per_user.items()
    }


def compare_runs(
    a: str | Path | Sequence[str | Path],
    b: str | Path | Sequence[str | Path],
    metrics: Sequence[str] = ("HR@10", "NDCG@10"),
    seed: int = 0,
    resamples: int = 9999,
) -> list[PairedDifference]:
    """Is run B better than run A on the same users? From the rank files of both (`results.write_ranks`).

    Where either is several runs that differ in their seed, each user counts with the mean over them: the test then
    says what other users would show with these seeds, and nothing of other seeds. The p-value is that of the paired
    randomisation test, which flips the sign of each user's difference (Smucker, Allan and Carterette, CIKM 2007).
    Raises ValueError when the files do not rank the same targets in the same way.
    """
    paths_a, paths_b = ([one] if isinstance(one, str | Path) else list(one) for one in (a, b))
    if not (paths_a and paths_b):
        raise ValueError("there is no run on one side of the comparison")
    files = {path: read_ranks(path) for path in (*paths_a, *paths_b)}
    for path, file in files.items():
        _require_comparable(files[paths_a[0]], file, paths_a[0], path)
    per_user = {path: _metrics_of(file, metrics) for path, file in files.items()}
    means = [{m: np.mean([per_user[path][m] for path in own], axis=0) for m in metrics} for own in (paths_a, paths_b)]
    return [_paired(name, means[0][name], means[1][name], seed, resamples) for name in metrics]


def _paired(metric: str, values_a: np.ndarray, values_b: np.ndarray, seed: int, resamples: int) -> PairedDifference:
    difference = np.round((values_b - values_a) * _GRID) / _GRID  # means of seeds are not exact to the last bit
    interval = bootstrap_intervals({metric: difference}, seed)[metric]
    return PairedDifference(
        metric=metric,
        mean_a=float(values_a.mean()),
        mean_b=float(values_b.mean()),
        difference=float(difference.mean()),
        interval=interval,
        p_value=_p_value(difference, seed, resamples),
        num_users=len(difference),
    )


def _p_value(difference: np.ndarray, seed: int, resamples: int) -> float:
    """Two-sided: how often random signs make the mean difference at least as large."""
    if not difference.any():
        return 1.0
    from scipy.stats import permutation_test, ttest_1samp  # takes long to import, and only comparisons need it

    if len(difference) > _MANY_USERS:
        return float(ttest_1samp(difference, 0.0).pvalue)
    test = permutation_test(
        (difference[difference != 0],),  # the sign of zero changes nothing
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _DRAWS_AT_ONCE // len(difference)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _metrics_of(file: RankFile, metrics: Sequence[str]) -> dict[str, np.ndarray]:
    cutoffs = sorted({int(name.rpartition("@")[2]) for name in metrics})
    return per_user_metrics(file.ranks.greater, file.ranks.equal, cutoffs, file.header["ties"])


def _require_comparable(file_a: RankFile, file_b: RankFile, path_a: str | Path, path_b: str | Path) -> None:
    for entry in _MUST_AGREE:
        value_a, value_b = file_a.header.get(entry), file_b.header.get(entry)
        if value_a != value_b:
            raise ValueError(f"{path_a} and {path_b} do not compare: {entry} is {value_a!r} and {value_b!r}")
    same_targets = file_a.raw_users == file_b.raw_users and np.array_equal(file_a.ranks.target, file_b.ranks.target)
    if not same_targets:
        raise ValueError(f"{path_a} and {path_b} share a split hash but not the same users and targets")
