"""The members of an ensemble: loaded from their run folders, checked, and asked about every validation user once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from data.batches import Examples
from data.member_examples import KnownScores, MemberBatch, MemberExamples
from data.splits import Phase, Split
from evaluation.run_folders import Run
from models.devices import gather_object
from models.ensemble import Ensemble, EnsembleConfig

from .earlier_runs import Asking, require_run
from .setting import Built, Setting

FEATURE_ROWS = 1024  # of which features are computed at once


def build_ensemble(setting: Setting) -> Built:
    config: EnsembleConfig = setting.method
    if len(config.members) < 2:
        raise ValueError(f"--method.members {config.members}: expected the folders of at least two finished runs")
    runs = [require_run(Path(path), "members", setting) for path in config.members]
    members = [setting.load_model(run.folder) for run in runs]
    model = Ensemble(config, [member.model for member in members])
    known: dict[Phase, KnownScores] = {}  # of the split that this run trains on

    def examples(split: Split, phase: Phase, trains: bool = False) -> MemberExamples:
        said = known.get(phase) if split is setting.split else None
        folds = None
        if phase == "valid" and model.gates is not None:
            folds = np.random.default_rng(setting.seed).permutation(len(split.targets(phase))) % config.folds
        own = [] if said is not None else [member.require_full_ranking()(split, phase) for member in members]
        return MemberExamples(split, phase, own, folds, said, trains)

    def training() -> Examples:
        known["valid"] = ask_once(model, runs, examples(setting.split, "valid"))
        labelled = examples(setting.split, "valid", trains=True)
        if config.fusion == "gate":
            rows = np.arange(len(labelled.lengths))
            parts = [labelled.collate(part) for part in np.split(rows, range(FEATURE_ROWS, len(rows), FEATURE_ROWS))]
            model.measure_features(torch.cat([model.features(part, *part.said()) for part in parts]))
        return labelled

    return Built(model, training, examples)


@torch.no_grad()
def ask_once(model: Ensemble, runs: Sequence[Run], examples: MemberExamples) -> KnownScores:
    """Return what the members say about each row: every process asks about its share, and all get all. Collective.

    Call it before the model is prepared: under ZeRO-3 no weight is cut yet.
    """
    asking = Asking.like(runs)
    model.to(PartialState().device).eval()
    told = []
    for batch in asking.batches(examples):
        assert isinstance(batch, MemberBatch)
        with asking.autocast():
            scores, gate_state = model.ask_members(batch)
        assert batch.row is not None
        told.append((batch.row.cpu(), scores.cpu(), None if gate_state is None else gate_state.cpu()))
    everyone = gather_object(told)
    rows = torch.cat([row for row, _, _ in everyone])
    order = torch.from_numpy(np.unique(rows.numpy(), return_index=True)[1])  # a loader may repeat rows
    states = [gate_state for _, _, gate_state in everyone if gate_state is not None]
    return KnownScores(
        torch.cat([scores for _, scores, _ in everyone])[order], torch.cat(states)[order] if states else None
    )
