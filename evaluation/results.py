"""What an evaluation leaves behind: figures with their header, and every user's rank in a Parquet file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from .ranks import Ranks

_HEADER_KEY = b"shardrec"
_CANDIDATES = "candidate_items"  # the column of their ids; "candidates" is how many there are


class Slice(NamedTuple):
    """The same metrics over some of the targets."""

    targets: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation, the same on every process."""

    metrics: dict[str, float]  # "NDCG@10" -> mean over users; "sampled-100/NDCG@10" under that protocol
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap over users, for all metrics but coverage
    ranks: Ranks
    recommendations: np.ndarray  # [n, top_k] item ids, best first, 0 where a user has fewer candidates
    header: dict[str, Any]  # what makes the figures comparable: split hash, mask, ties, protocol, ...
    raw_users: tuple[str, ...] = field(repr=False)  # [U]
    candidates: np.ndarray | None = field(default=None, repr=False)  # [n, C] item ids; None for the whole catalogue
    slices: dict[str, Slice] = field(default_factory=dict)  # "cold", "warm" and "cold-only", where the split has any

    def as_results(self) -> dict[str, Any]:
        """The JSON form that results.json holds: every metric by its name, "intervals", "header" and any "slices"."""
        results = {**self.metrics, "intervals": _as_lists(self.intervals), "header": self.header}
        if self.slices:
            results["slices"] = {
                name: {"targets": part.targets, **part.metrics, "intervals": _as_lists(part.intervals)}
                for name, part in self.slices.items()
            }
        return results


def _as_lists(intervals: dict[str, tuple[float, float]]) -> dict[str, list[float]]:
    return {name: list(interval) for name, interval in intervals.items()}


def over_draws(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The JSON form of evaluations that differ in their candidates alone: every metric's mean over the draws by its
    name, "spread" (their standard deviation) and "draws", each with its own header.
    """
    draws = {name: [evaluation.metrics[name] for evaluation in evaluations] for name in evaluations[0].metrics}
    return {
        **{name: float(np.mean(figures)) for name, figures in draws.items()},
        "spread": {name: float(np.std(figures, ddof=1)) for name, figures in draws.items()},
        "draws": [evaluation.as_results() for evaluation in evaluations],
    }


class RankFile(NamedTuple):
    ranks: Ranks
    raw_users: tuple[str, ...]  # [n]: the raw id of each row's user
    header: dict[str, Any]
    candidates: np.ndarray | None = None  # [n, C] item ids, where targets were ranked among candidates


def write_ranks(evaluation: Evaluation, path: str | Path) -> None:
    """Write one Parquet row a target, with the user's raw id and its candidates; the header goes to the metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {
        "raw_user": [evaluation.raw_users[user] for user in evaluation.ranks.user],
        **vars(evaluation.ranks),
    }
    if evaluation.candidates is not None:
        flat, count = evaluation.candidates.ravel(), evaluation.candidates.shape[1]
        columns[_CANDIDATES] = pa.FixedSizeListArray.from_arrays(pa.array(flat), count)
    header = json.dumps(evaluation.header).encode()
    parquet.write_table(pa.table(columns).replace_schema_metadata({_HEADER_KEY: header}), path)


def read_ranks(path: str | Path) -> RankFile:
    """Read what `write_ranks` wrote; raises ValueError for a Parquet file without an evaluation's header."""
    table = parquet.read_table(path)
    metadata = table.schema.metadata or {}
    if _HEADER_KEY not in metadata:
        raise ValueError(f"{path} has no evaluation header; expected a rank file that an evaluation wrote")
    columns = {name: table[name].to_numpy() for name in Ranks.__dataclass_fields__}
    candidates = np.stack(table[_CANDIDATES].to_numpy()) if _CANDIDATES in table.column_names else None
    header = json.loads(metadata[_HEADER_KEY])
    return RankFile(Ranks(**columns), tuple(table["raw_user"].to_pylist()), header, candidates)
