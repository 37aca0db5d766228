"""Fused scores by hand, a gate that must learn whom to believe when, and real runs of runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.processes import run, start, start_ranks
from data.member_examples import NO_FOLD, MemberBatch
from launch.config import parse
from models.base import Loss, Recommender
from models.ensemble import Ensemble, EnsembleConfig
from tests.runs import losses, results


class Silent(Recommender):
    """A member whose scores are given with the batch."""

    def loss(self, batch: Any) -> Loss:
        raise NotImplementedError

    def scores(self, batch: Any) -> Tensor:
        raise NotImplementedError


def ensemble(members: int = 2, **settings: Any) -> Ensemble:
    folders = [f"runs/{i}" for i in range(members)]
    return Ensemble(EnsembleConfig(members=folders, **settings), [Silent() for _ in folders])


def users(scores_BMN: Tensor, seen: list[list[int]], lengths: list[int] | None = None) -> MemberBatch:
    """Evaluation rows with known scores; histories are padded with 0."""
    longest = max(1, *map(len, seen))
    padded = torch.tensor([items + [0] * (longest - len(items)) for items in seen])
    rows = torch.arange(len(seen))
    known = torch.tensor(lengths or [len(items) for items in seen])
    return MemberBatch(padded, known, torch.full_like(rows, NO_FOLD), scores=scores_BMN, row=rows)


def test_reciprocal_ranks_by_hand() -> None:
    # items 1..4; the user has met item 3, whose high scores must not push the others down
    first, second = [-9.0, 5.0, 4.0, 99.0, 3.0], [-9.0, 0.1, 0.3, 7.0, 0.3]
    batch = users(torch.tensor([[first, second]]), [[3]])
    model = ensemble(fusion="reciprocal-rank", rank_constant=10.0)
    expected = [1 / 11 + 1 / 13, 1 / 12 + 1 / 11, 1 / 11 + 1 / 11, 1 / 13 + 1 / 11]  # equal scores share a rank
    assert model(batch)[0].tolist() == pytest.approx([-torch.inf, *expected])
    assert not list(model.parameters())


def test_given_weights_mix_probabilities_over_unseen_items() -> None:
    scores = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0)) * 4
    mixed = ensemble(fusion="weight", weights=[3.0, 1.0])(users(scores, [[2], [4, 5], [1]])).exp()
    for user, unseen in enumerate(([1, 3, 4, 5], [1, 2, 3], [2, 3, 4, 5])):
        p = scores[user][:, unseen].softmax(1)
        torch.testing.assert_close(mixed[user, unseen], 0.75 * p[0] + 0.25 * p[1])


PLANTED_USERS, PLANTED_ITEMS = 400, 30


def planted() -> MemberBatch:
    """Member 0 knows the target of users with short histories, member 1 of those with long ones; both sound as sure."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(1, PLANTED_ITEMS + 1, (PLANTED_USERS,), generator=generator)
    lengths = torch.randint(1, 41, (PLANTED_USERS,), generator=generator)
    claimed = torch.randint(1, PLANTED_ITEMS + 1, (PLANTED_USERS, 2), generator=generator)
    knows = (lengths > 20).long()
    claimed[torch.arange(PLANTED_USERS), knows] = target
    scores = torch.randn(PLANTED_USERS, 2, PLANTED_ITEMS + 1, generator=generator)
    scores.scatter_add_(2, claimed[..., None], torch.full((PLANTED_USERS, 2, 1), 6.0))
    batch = users(scores, [[0]] * PLANTED_USERS, lengths.tolist())
    return replace(batch, fold=torch.arange(PLANTED_USERS) % 4, targets=target, row=None, count=PLANTED_USERS)


def hits(scores: Tensor, targets: Tensor) -> float:
    scores[:, 0] = -torch.inf
    return (scores.argmax(1) == targets).float().mean().item()


def fitted(fusion: str) -> tuple[float, float]:
    """Return how often the target comes first, and member 1's mean weight among users with long histories."""
    torch.manual_seed(0)
    model, batch = ensemble(fusion=fusion, folds=4), planted()
    assert batch.targets is not None
    if fusion == "gate":
        model.measure_features(model.features(batch, *batch.said()))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        loss = model(batch)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = replace(batch, targets=None, row=torch.arange(PLANTED_USERS), count=0)
    weights = model.log_weights(batch, *batch.said()).exp().mean(0)[batch.lengths > 22, 1]
    return hits(model(held_out), batch.targets), weights.mean().item()


def test_a_gate_learns_whom_to_believe_and_beats_both_members_on_users_it_has_not_seen() -> None:
    batch = planted()
    members = [hits(batch.scores[:, member].clone(), batch.targets) for member in (0, 1)]  # type: ignore[index, arg-type]
    gated, weight_of_long = fitted("gate")
    assert max(members) < 0.65
    assert gated > 0.9
    assert weight_of_long > 0.85
    assert fitted("weight")[0] < 0.75  # the same weights for all cannot know


def test_a_gate_never_learns_from_the_users_it_is_measured_on() -> None:
    model, batch = ensemble(folds=4), planted()
    model.measure_features(model.features(batch, *batch.said()))
    of_fold_2 = batch.fold == 2
    assert batch.targets is not None
    only = replace(batch, targets=batch.targets.where(of_fold_2, 0), count=int(of_fold_2.sum()))
    model(only).total.backward()
    assert model.gates is not None
    for name, parameter in model.gates.named_parameters():
        assert parameter.grad is not None
        learned = parameter.grad.flatten(1).abs().sum(1) > 0
        if name in ("bias", "outer", "log_temperature"):
            assert learned.tolist() == [True, True, False, True], name
    measured = replace(batch, targets=None, row=torch.arange(PLANTED_USERS))
    before = model(measured).clone()
    with torch.no_grad():
        model.gates.bias[2, 0] += 5
    changed = (model(measured) - before)[:, 1:].abs().amax(1) > 1e-6
    assert torch.equal(changed, of_fold_2)


def test_muted_rows_add_nothing() -> None:
    model, batch = ensemble(folds=4), planted()
    loss = model(batch.muted())
    loss.total.backward()
    assert loss.total == 0
    assert loss.count == 0
    assert model.gates is not None
    assert all(p.grad is not None and not p.grad.any() for p in model.gates.parameters())


DATA = "--data.source sample --data.sample_users 96 --data.sample_series 20 --train.trackers [] --train.precision fp32"
MEMBER = f"{DATA} --method.window 12 --method.hidden_size 16 --method.num_blocks 1 --train.lr 0.01"
GATED = "--train.epochs 3 --train.batch_size 16 --train.lr 0.01"


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two small runs of different kinds and lengths."""
    folder = tmp_path_factory.mktemp("members")
    for name, flags in (("short", "--model sasrec --train.epochs 1"), ("long", "--model lrurec --train.epochs 6")):
        done = run(*MEMBER.split(), *flags.split(), output=folder / name)
        assert (done.folder / "results.json").is_file(), done.text()
    return [folder / "short", folder / "long"]


def command(members: list[Path], *flags: str) -> list[str]:
    named = f"--method.members=[{', '.join(map(str, members))}]"
    return ["--model=ensemble", *DATA.split(), *GATED.split(), named, *flags]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--method.use_state=true"], ["--method.fusion=weight"]])
def test_a_run_of_runs(members: list[Path], tmp_path: Path, flags: list[str]) -> None:
    done = run(*command(members, *flags), output=tmp_path / "ensemble")
    found, alone = results(done.folder), results(members[1])
    assert found["split"]["hash"] == alone["split"]["hash"]
    assert found["test"]["NDCG@10"] > 0.75 * alone["test"]["NDCG@10"]
    logged = losses(done.folder)
    assert logged[-1]["loss"] < logged[0]["loss"] + 0.1
    assert logged[-1]["loss/weight_0"] + logged[-1]["loss/weight_1"] == pytest.approx(1, abs=1e-4)
    assert logged[-1]["loss/weight_1"] > logged[-1]["loss/weight_0"], "the member that was trained longer counts more"
    size = (done.folder / "model" / "model.safetensors").stat().st_size
    assert size < (members[0] / "model" / "model.safetensors").stat().st_size / 2, "members are not written again"

    # read again by another process, which asks the members anew
    for phase in ("valid", "test"):
        again = start(f"--phase={phase}", script="evaluate", output=done.folder)
        assert again.wait() == 0, again.text()
        file = done.folder / "evaluations" / f"{phase}-full-full-history-expected.json"
        assert json.loads(file.read_text())["NDCG@10"] == pytest.approx(found[phase]["NDCG@10"], abs=1e-6)


def test_ranks_are_fused_without_training(members: list[Path], tmp_path: Path) -> None:
    done = run(*command(members, "--method.fusion=reciprocal-rank"), output=tmp_path / "fused")
    found = results(done.folder)
    assert found["training"] == {"steps": 0, "best_step": None}
    assert found["parameters"]["trainable"] == 0
    assert found["test"]["NDCG@10"] > found["popularity"]["NDCG@10"]


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["gate", "reciprocal-rank"])
def test_two_processes_give_what_one_does(members: list[Path], tmp_path: Path, fusion: str) -> None:
    flag = f"--method.fusion={fusion}"
    one = run(*command(members, flag), output=tmp_path / "one")
    ranks = start_ranks(*command(members, flag), output=tmp_path / "two")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text()
    found, alone = results(tmp_path / "two"), results(one.folder)
    assert found["test"]["NDCG@10"] == pytest.approx(alone["test"]["NDCG@10"], abs=2e-3)
    if fusion == "gate":
        pairs = zip(losses(tmp_path / "two"), losses(one.folder), strict=True)
        assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-4) for a, b in pairs)


def test_members_of_other_data_are_refused(members: list[Path], tmp_path: Path) -> None:
    flags = [flag.replace("96", "90") for flag in command(members)]
    done = run(*flags, output=tmp_path / "other")
    assert "was trained on split" in done.text()
    assert not (tmp_path / "other" / "results.json").exists()
    other = Path(shutil.copytree(members[0], tmp_path / "renamed"))
    catalog = json.loads((other / "model" / "catalog.json").read_text())
    catalog["raw_ids"][1:3] = catalog["raw_ids"][2:0:-1]  # two items swapped: the same number, other meanings
    (other / "model" / "catalog.json").write_text(json.dumps(catalog))
    done = run(*command([other, members[1]]), output=tmp_path / "swapped")
    assert "has learned another catalogue" in done.text()


def test_a_member_that_has_moved_is_named(members: list[Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(members[0], tmp_path / "moved"))
    done = run(*command([moved, members[1]], "--method.fusion=reciprocal-rank"), output=tmp_path / "ensemble")
    assert (done.folder / "results.json").is_file(), done.text()
    moved.rename(tmp_path / "elsewhere")
    again = start(script="evaluate", output=done.folder)
    assert again.wait() != 0
    assert "Traceback" not in again.text()
    assert f"--method.members of {done.folder} names {moved}" in again.text()
    alone = run(*command([members[0]]), output=tmp_path / "alone")
    assert "at least two finished runs" in alone.text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method.weights [1,2]", "goes with --method.fusion weight"),
        ("--method.fusion weight --method.weights [1]", "expected a weight of at least 0 for each of the 2"),
        ("--method.folds 1", "--method.folds 1: expected at least 2"),
    ],
)
def test_mistakes_are_one_line(flags: str, message: str) -> None:
    with pytest.raises(SystemExit, match="error") as stopped:
        parse(["--model=ensemble", "--method.members=[a, b]", *flags.split()])
    assert message in str(stopped.value.code)
