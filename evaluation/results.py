"""What an evaluation leaves behind: figures with their header, and every user's rank in a Parquet file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from .ranks import Ranks

_HEADER_KEY = b"shardrec"


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation, the same on every process."""

    metrics: dict[str, float]  # "NDCG@10" -> mean over users; "sampled-100/NDCG@10" under that protocol
    intervals: dict[str, tuple[float, float]]  # 95 % bootstrap over users, for all metrics but coverage
    ranks: Ranks
    recommendations: np.ndarray  # [n, top_k] item ids, best first, 0 where a user has fewer candidates
    header: dict[str, Any]  # what makes the figures comparable: split hash, mask, ties, protocol, ...
    raw_users: tuple[str, ...] = field(repr=False)  # [U]

    def as_results(self) -> dict[str, Any]:
        """The JSON form that results.json holds: every metric by its name, "intervals" and "header"."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {**self.metrics, "intervals": intervals, "header": self.header}


class RankFile(NamedTuple):
    ranks: Ranks
    raw_users: tuple[str, ...]  # [n]: the raw id of each row's user
    header: dict[str, Any]


def write_ranks(evaluation: Evaluation, path: str | Path) -> None:
    """Write one Parquet row a target, with the user's raw id; the header goes to the file's metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "raw_user": [evaluation.raw_users[user] for user in evaluation.ranks.user],
        **vars(evaluation.ranks),
    }
    header = json.dumps(evaluation.header).encode()
    parquet.write_table(pa.table(columns).replace_schema_metadata({_HEADER_KEY: header}), path)


def read_ranks(path: str | Path) -> RankFile:
    """Read what `write_ranks` wrote; raises ValueError for a Parquet file without an evaluation's header."""
    table = parquet.read_table(path)
    metadata = table.schema.metadata or {}
    if _HEADER_KEY not in metadata:
        raise ValueError(f"{path} has no evaluation header; expected a rank file that an evaluation wrote")
    columns = {name: table[name].to_numpy() for name in Ranks.__dataclass_fields__}
    return RankFile(Ranks(**columns), tuple(table["raw_user"].to_pylist()), json.loads(metadata[_HEADER_KEY]))
