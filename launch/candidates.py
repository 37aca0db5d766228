"""The candidates of an earlier run: asked for once by all processes together, then kept in the cache."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch import Tensor

from data.candidate_store import (
    CandidateStore,
    StoredPhase,
    TrainingWindows,
    as_test,
    rows_of,
    store_name,
    training_cuts,
)
from data.splits import Phase, Split, Targets
from evaluation.protocols import Mask, seen_pairs
from evaluation.ranks import PADDING_ITEM, top_items
from evaluation.results import Evaluation
from evaluation.two_stages import two_stage_figures
from models.devices import gather_object

from .earlier_runs import Asking, require_run
from .setting import Built, EveryPosition, Setting

logger = logging.getLogger("shardrec")

MASK: Mask = "full-history"
SEEN_IN_TRAINING: Phase = "test"  # as which training events are asked for
WAIT_SECONDS = 3600  # for another job that asks for the same candidates
SCORES_AT_ONCE = 2**25  # numbers of catalogue scores alive at once where one pass answers many positions: 128 MB


class Top(NamedTuple):
    """The best items of some rows of a store, on the host."""

    rows: np.ndarray  # [R] int64
    items: np.ndarray  # [R, k] int32
    scores: np.ndarray  # [R, k] float32


class Retriever:
    """A finished run that names candidates; the flag --method.`flag` says which one.

    Raises ValueError where there is no such run, or it learned other data than `setting` has.
    """

    def __init__(self, path: Path, setting: Setting, flag: str = "retriever") -> None:
        self.run, self.setting = require_run(path, flag, setting), setting

    @cached_property
    def _asking(self) -> Asking:
        # not before it is needed: a command that loads a run joins its launch afterwards
        return Asking.like([self.run])

    def load(self) -> Built:
        """Its model and examples, ready to score on this process's device; nobody keeps them but the caller."""
        built = self.setting.load_model(self.run.folder)
        built.require_full_ranking()
        built.model.to(PartialState().device).requires_grad_(False).eval()
        return built

    @cached_property
    def checksum(self) -> str:
        """Of its weights and settings."""
        return checksum_of(self.run.folder)

    def candidates(self, split: Split, phase: StoredPhase, k: int) -> CandidateStore:
        """The top k for each row of a phase, the same on every process. Collective.

        Those of a data set are kept in the cache under a name that says of which weights and rows they are.
        """
        if not split.hash:
            return self.ask(split, phase, k)
        state = PartialState()
        path = self.setting.cache / "candidates" / store_name(split, phase, k, self.checksum)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock", timeout=WAIT_SECONDS)
        if state.is_main_process:
            lock.acquire()
        try:
            found = [self._kept(path, split, phase, k) if state.is_main_process else None]
            store: CandidateStore | None = broadcast_object_list(found)[0]
            if store is None:
                with torch.random.fork_rng(devices=[]):  # else weights made later would tell what was in the cache
                    store = self.ask(split, phase, k)
                if state.is_main_process:
                    store.save(path)
        finally:
            lock.release()
        return store

    def _kept(self, path: Path, split: Split, phase: StoredPhase, k: int) -> CandidateStore | None:
        if path.is_file():
            try:
                return CandidateStore.load(path, len(rows_of(split, phase)), k)
            except ValueError as error:
                logger.warning("%s: asking %s anew", error, self.run.folder)
        else:
            logger.info("asking %s for the top %d of each %s history", self.run.folder, k, phase)
        return None

    def ask(self, split: Split, phase: StoredPhase, k: int) -> CandidateStore:
        """Let every process ask about its share, and give all to all. Collective."""
        return best_of(self.load(), self._asking, split, phase, k)


def checksum_of(run: Path) -> str:
    """sha256 of a run's weights and settings: an ensemble of fixed weights has no other weights than its members'."""
    digest = hashlib.sha256((run / "model" / "config.json").read_bytes())
    with open(run / "model" / "model.safetensors", "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@torch.no_grad()
def best_of(
    built: Built,
    asking: Asking,
    split: Split,
    phase: StoredPhase,
    k: int,
    rows: np.ndarray | None = None,
    each: Callable[[Iterator[Top]], Iterator[Top]] = iter,
) -> CandidateStore:
    """Return a loaded model's best k for each row of a phase; of phase train, for these `rows`, which ascend.

    Every process asks about its share, and all get all; `each` sees what is found as it is found. Collective.
    """
    if phase != "train":
        count = len(rows_of(split, phase))
        return gathered(each(_each_row(built, asking, split, phase, np.arange(count), k)), count)
    cuts = training_cuts(split)
    rows = np.arange(len(cuts)) if rows is None else rows
    if built.every_position is not None:
        tops = _all_positions(built.model, built.every_position, asking, split, rows, k)
    else:
        asked = as_test(split, Targets(cuts.user[rows], cuts.position[rows]))
        tops = _each_row(built, asking, asked, SEEN_IN_TRAINING, rows, k)
    return gathered(each(tops), len(rows))


def _each_row(built: Built, asking: Asking, split: Split, phase: Phase, rows: np.ndarray, k: int) -> Iterator[Top]:
    """One pass a history; `rows` are what the targets of the phase are called."""
    for batch in asking.batches(built.require_full_ranking()(split, phase)):
        assert batch.row is not None
        with asking.autocast():
            scores_BN = built.model(batch)
        index = batch.row.cpu().numpy()
        yield _top(scores_BN, split, phase, index, k)._replace(rows=rows[index])


def _all_positions(
    model: Any, how: EveryPosition, asking: Asking, split: Split, rows: np.ndarray, k: int
) -> Iterator[Top]:
    """One pass a window of training events, which overlap by half a window.

    A position reads at least half of the events that an evaluation would, and none that stands behind it.
    """
    windows, asked = TrainingWindows(split, how.window, how.examples, rows), as_test(split, training_cuts(split))
    wanted = np.zeros(len(training_cuts(split)), dtype=bool)
    wanted[rows] = True
    for batch in asking.batches(windows):
        assert batch.row is not None
        with asking.autocast():
            states_TH = model.read(batch)
        cuts = windows.cuts(batch.row.cpu().numpy())
        query, table = model.operands(states_TH[torch.from_numpy(wanted[cuts]).to(states_TH.device)].float())
        cuts = cuts[wanted[cuts]]
        at_once = max(1, SCORES_AT_ONCE // len(table))
        for start in range(0, len(cuts), at_once):
            scores = query[start : start + at_once].float() @ table.float().T
            yield _top(scores, asked, SEEN_IN_TRAINING, cuts[start : start + at_once], k)


def gathered(tops: Iterator[Top], num_rows: int) -> CandidateStore:
    """Give what every process has found to all, in the order of rows. Collective."""
    everyone: list[Top] = gather_object(list(tops))
    rows = np.concatenate([top.rows for top in everyone])
    first = np.unique(rows, return_index=True)[1]  # a loader may repeat rows
    if len(first) != num_rows:
        raise ValueError(f"{len(first)} of {num_rows} histories got candidates")
    items, scores = (np.concatenate([top[i] for top in everyone])[first] for i in (1, 2))
    return CandidateStore(items, scores)


@dataclass(frozen=True)
class FirstStage:
    """The first stage as the second one sees it: k candidates, asked for once a run; `flag` is the name of k."""

    retriever: Retriever
    k: int
    flag: str
    split: Split
    known: dict[StoredPhase, CandidateStore] = field(default_factory=dict)

    def candidates(self, split: Split, phase: StoredPhase) -> CandidateStore:
        """The candidates of a phase, the same on every process. Collective."""
        if split is not self.split:
            return self.retriever.candidates(split, phase, self.k).require_full(self.flag)
        if phase not in self.known:
            self.known[phase] = self.retriever.candidates(split, phase, self.k).require_full(self.flag)
        return self.known[phase]

    def report_ceiling(self) -> None:
        """Log what no ranking of the candidates can exceed."""
        valid, test = (
            self.candidates(self.split, phase).recall(self.split.target_items(phase)) for phase in ("valid", "test")
        )
        folder = self.retriever.run.folder
        logger.info("%s finds %.4f of validation and %.4f of test targets in its top %d", folder, valid, test, self.k)

    def figures(self, split: Split, evaluation: Evaluation) -> dict[str, Any]:
        """What an evaluation of reranked candidates means, for results.json."""
        places = self.candidates(split, evaluation.header["phase"]).places(evaluation.ranks.target)
        return {"candidates": self.k, **two_stage_figures(evaluation, places, self.k)}


def _top(scores_TN: Tensor, split: Split, phase: Phase, rows: np.ndarray, k: int) -> Top:
    """The k best items of each row that its history does not hold."""
    if scores_TN.isnan().any():
        raise ValueError("NaN among the scores of the model that is asked")
    scores_TN = scores_TN.float()
    allowed_TN = scores_TN > -torch.inf
    allowed_TN[:, PADDING_ITEM] = False
    seen_rows, seen_items = (torch.from_numpy(a).to(scores_TN.device) for a in seen_pairs(split, phase, MASK, rows))
    allowed_TN[seen_rows, seen_items] = False
    items_TK = top_items(scores_TN, allowed_TN, k)
    kept_TK = scores_TN.gather(1, items_TK).masked_fill(items_TK == PADDING_ITEM, -torch.inf)
    return Top(rows, items_TK.int().cpu().numpy(), kept_TK.cpu().numpy())
