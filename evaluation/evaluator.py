"""The one evaluator: every process ranks its share of the targets, and every target is counted once.

Metrics are never averaged per process. Each row carries its index; counts are gathered, duplicates (which
samplers add to even out the last batch) are dropped, and the row set must then be complete. All processes
compute the metrics from the same sorted arrays, so no figure depends on how many processes there were.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from typing import Protocol as Interface

import numpy as np
import torch
from accelerate.state import PartialState
from torch import Tensor, nn

from data.splits import Phase, Split
from models.devices import gather_object
from models.popularity import Popularity

from .metrics import Ties, coverage, per_user_metrics
from .protocols import Mask, Protocol, candidates_hash, draw_candidates, metric_prefix, seen_pairs
from .ranks import InvalidScoresError, Ranks, candidate_mask, count_among, top_items
from .results import Evaluation, Slice
from .significance import bootstrap_intervals


class RowBatch(Interface):
    """All that the evaluator asks of a batch."""

    @property
    def row(self) -> Tensor | None:
        """[B] int64: index into split.targets(phase)."""


class _Share(NamedTuple):
    """What one batch, one process or all of them measured."""

    counts: np.ndarray  # [B, 6] int64: row, greater, equal, candidates; greater and equal among cold items alone
    recommendations: np.ndarray  # [B, top_k] int64
    dtypes: frozenset[str]  # of the scores, as the model gave them


class Evaluator:
    """Ranks the targets of one phase of a split under one protocol.

    Full-catalogue ranking with the user's full history masked, and the expected metric over tied positions,
    unless told otherwise. Candidate sets are drawn here, once, so every run of this evaluator ranks among the
    same. `top_k` recommendations a target are kept for coverage and for display.
    """

    def __init__(
        self,
        split: Split,
        phase: Phase,
        *,
        cutoffs: Sequence[int] = (1, 5, 10, 20),
        protocol: Protocol = "full",
        mask: Mask = "full-history",
        ties: Ties = "expected",
        seed: int = 0,
        top_k: int = 10,
    ) -> None:
        self.split, self.phase = split, phase
        self.cutoffs, self.top_k = tuple(cutoffs), top_k
        self.protocol, self.mask, self.ties, self.seed = protocol, mask, ties, seed
        self.users, self.targets = split.targets(phase).user, split.target_items(phase)
        self.candidates = draw_candidates(split, phase, protocol, seed)

    def run(self, model: Callable[[Any], Tensor], batches: Iterable[RowBatch]) -> Evaluation:
        """Score this process's `batches` with `model` (-> [B, N + 1]), then gather: call it on every process.

        Raises ValueError when scores are NaN or +inf (naming the users), when their width is not that of the
        catalogue, or when the processes together did not evaluate every target.
        """
        start = time.perf_counter()
        was_training = isinstance(model, nn.Module) and model.training
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():  # inference mode would make tensors that ZeRO-3 cannot train with later
            share = _join([self._rank_batch(model, batch) for batch in batches], self.top_k)
        if isinstance(model, nn.Module):
            model.train(was_training)
        everyone = _every_row_once(_join(gather_object([share]), self.top_k), len(self.targets))
        return self._summarise(everyone, time.perf_counter() - start)

    def _rank_batch(self, model: Callable[[Any], Tensor], batch: RowBatch) -> _Share:
        if batch.row is None:
            raise ValueError("a training batch reached the evaluator: evaluation batches carry `row`")
        rows = batch.row.cpu().numpy()
        seen_rows, seen_items = seen_pairs(self.split, self.phase, self.mask, rows)
        scores_BN = model(batch)
        expected_shape = (len(rows), self.split.num_items + 1)
        if scores_BN.shape != expected_shape:
            raise ValueError(
                f"scores have shape {tuple(scores_BN.shape)}, expected {expected_shape}: a row a target, "
                "a column an item, and column 0 for padding"
            )

        dtype = str(scores_BN.dtype).removeprefix("torch.")
        scores_BN = scores_BN.float()

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(scores_BN.device, non_blocking=True)

        target_B = on_device(self.targets[rows])
        candidates_BC = None if self.candidates is None else on_device(self.candidates[rows])
        allowed_BN = candidate_mask(scores_BN, target_B, on_device(seen_rows), on_device(seen_items), candidates_BC)
        try:
            counts = count_among(scores_BN, target_B, allowed_BN)
            cold_BN = self._among_cold(allowed_BN, target_B, rows)
            among_cold = counts if cold_BN is None else count_among(scores_BN, target_B, cold_BN)
        except InvalidScoresError as error:
            users = [self.split.raw_users[user] for user in self.users[rows[error.rows]]]
            raise ValueError(f"NaN or +inf among the scores of users {users}") from error
        top_BK = top_items(scores_BN, allowed_BN, self.top_k)
        counts_B6 = np.column_stack([rows, torch.stack([*counts, *among_cold[:2]], dim=1).cpu().numpy()])
        return _Share(counts_B6, top_BK.cpu().numpy(), frozenset({dtype}))

    def _among_cold(self, allowed_BN: Tensor, target_B: Tensor, rows: np.ndarray) -> Tensor | None:
        """Return which cold items compete in each row, and the target; None where no target of these rows is cold."""
        if self.candidates is not None or not np.isin(self.targets[rows], self.split.cold_items).any():
            return None
        is_cold_N = torch.zeros(allowed_BN.shape[1], dtype=torch.bool, device=allowed_BN.device)
        is_cold_N[torch.from_numpy(self.split.cold_items).to(allowed_BN.device)] = True
        return (allowed_BN & is_cold_N).scatter_(1, target_B[:, None], True)

    def _summarise(self, share: _Share, seconds: float) -> Evaluation:
        row, greater, equal, candidates, greater_cold, equal_cold = share.counts.T.copy()
        ranks = Ranks(row, self.users, self.targets, greater, equal, candidates)
        prefix = metric_prefix(self.protocol)
        per_user = {
            prefix + name: values for name, values in per_user_metrics(greater, equal, self.cutoffs, self.ties).items()
        }
        metrics = {name: float(values.mean()) for name, values in per_user.items()}
        for cutoff in self.cutoffs:
            if cutoff <= self.top_k:
                metrics[f"{prefix}coverage@{cutoff}"] = coverage(share.recommendations, self.split.num_items, cutoff)
        all_tied = (equal + 1 == candidates) & (candidates > 1)
        header = {
            "dataset": self.split.name,
            "split": self.split.kind,
            "split_hash": self.split.hash,
            "phase": self.phase,
            "users_evaluated": len(self.users),
            "users_skipped": self.split.num_users - len(self.users),  # too few events to hold one out
            "catalog_size": self.split.num_items,
            "cold_items": len(self.split.cold_items),
            "protocol": self.protocol,
            "candidates_hash": candidates_hash(self.candidates),
            "mask": self.mask,
            "ties": self.ties,
            "cutoffs": list(self.cutoffs),
            "seed": self.seed,
            "score_dtype": "+".join(sorted(share.dtypes)),
            "world_size": PartialState().num_processes,
            "constant_score_rows": int(all_tied.sum()),
            "seconds": round(seconds, 3),
        }
        intervals = bootstrap_intervals(per_user, self.seed)
        recommendations, raw_users = share.recommendations, self.split.raw_users
        slices = self._slices(per_user, per_user_metrics(greater_cold, equal_cold, self.cutoffs, self.ties))
        return Evaluation(metrics, intervals, ranks, recommendations, header, raw_users, self.candidates, slices)

    def _slices(self, per_user: dict[str, np.ndarray], among_cold: dict[str, np.ndarray]) -> dict[str, Slice]:
        """Return the metrics of targets that are cold items beside those of all others, where there are both.

        Of the whole catalogue cold items are also ranked among each other: who knows that an item is new, and shows new
        items in a place of their own, asks for that.
        """
        is_cold = np.isin(self.targets, self.split.cold_items)
        parts = {"cold": (per_user, is_cold), "warm": (per_user, ~is_cold)}
        if self.candidates is None:
            parts["cold-only"] = (among_cold, is_cold)
        slices = {}
        for name, (measured, rows) in parts.items():
            part = {metric: values[rows] for metric, values in measured.items()}
            if is_cold.any() and rows.any():
                means = {metric: float(values.mean()) for metric, values in part.items()}
                slices[name] = Slice(int(rows.sum()), means, bootstrap_intervals(part, self.seed))
        return slices


def _join(shares: Sequence[_Share], top_k: int) -> _Share:
    nothing = _Share(np.empty((0, 6), np.int64), np.empty((0, top_k), np.int64), frozenset())
    counts, recommendations, dtypes = zip(nothing, *shares, strict=True)  # a process may have no batch at all
    return _Share(np.concatenate(counts), np.concatenate(recommendations), frozenset().union(*dtypes))


def _every_row_once(share: _Share, num_targets: int) -> _Share:
    """Sort by row and drop the rows that came twice; every row 0 .. num_targets - 1 must be there."""
    rows, first = np.unique(share.counts[:, 0], return_index=True)
    missing = np.setdiff1d(np.arange(num_targets), rows)
    unknown = np.setdiff1d(rows, np.arange(num_targets))
    if missing.size or unknown.size:
        raise ValueError(
            f"{missing.size} of {num_targets} targets were not evaluated (rows {missing[:5].tolist()} ...) "
            f"and {unknown.size} rows are not of this split; the evaluation loader must cover every target"
        )
    return _Share(share.counts[first], share.recommendations[first], share.dtypes)


class _Rows(NamedTuple):
    row: Tensor


def evaluate_popularity(
    split: Split,
    phase: Phase,
    *,
    cutoffs: Sequence[int] = (1, 5, 10, 20),
    protocol: Protocol = "full",
    mask: Mask = "full-history",
    ties: Ties = "expected",
    seed: int = 0,
    batch_size: int = 256,
) -> Evaluation:
    """The popularity baseline on the same split and protocol; needs no loader. Call it on every process."""
    state = PartialState()
    rows = torch.arange(len(split.target_items(phase)))[state.process_index :: state.num_processes]
    evaluator = Evaluator(split, phase, cutoffs=cutoffs, protocol=protocol, mask=mask, ties=ties, seed=seed)
    return evaluator.run(Popularity.of(split), map(_Rows, rows.split(batch_size)))
