"""Evaluating a run again: the same figures as its own, other protocols under their names, files left behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.results import read_ranks
from launch import evaluate, train


def evaluated(run: Path, capsys: pytest.CaptureFixture[str], name: str, *flags: str) -> tuple[dict, str]:
    """Return the written figures and what was shown."""
    assert evaluate.main(["--run", str(run), *flags]) == 0
    return json.loads((run / "evaluations" / f"{name}.json").read_text()), capsys.readouterr().out


@pytest.mark.parametrize("phase", ["test", "valid"])
def test_full_ranking_repeats_the_runs_own_figures(
    trained: Path, capsys: pytest.CaptureFixture[str], phase: str
) -> None:
    flags = [] if phase == "test" else ["--phase", phase]
    figures, shown = evaluated(trained, capsys, f"{phase}-full-full-history-expected", *flags, "--batch_size", "7")
    results = json.loads((trained / "results.json").read_text())
    own = results[phase]
    assert figures["model"] == "sasrec"
    assert {name: figures[name] for name in own if "@" in name} == {n: v for n, v in own.items() if "@" in n}
    assert figures["intervals"] == own["intervals"]
    assert figures["header"]["split_hash"] == results["split"]["hash"]
    if phase == "test":
        assert figures["popularity"]["NDCG@10"] == results["popularity"]["NDCG@10"]
    assert f"{own['NDCG@10']:.4f}" in shown
    assert f"{phase}-full-full-history-expected.json" in shown


@pytest.mark.parametrize(("protocol", "negatives"), [("sampled-100", 100), ("candidates-20", 19)])
def test_a_protocol_stands_before_its_figures(
    trained: Path, capsys: pytest.CaptureFixture[str], protocol: str, negatives: int
) -> None:
    name = f"test-{protocol}-full-history-expected"
    figures, shown = evaluated(trained, capsys, name, "--protocol", protocol)
    full = json.loads((trained / "results.json").read_text())["test"]
    assert "NDCG@10" not in figures
    assert figures[f"{protocol}/HR@10"] > full["HR@10"]
    assert f"{protocol}/NDCG@10" in shown
    ranks = read_ranks(trained / "evaluations" / f"{name}.parquet")
    assert np.all(ranks.ranks.candidates == negatives + 1)
    assert len(ranks.raw_users) == figures["header"]["users_evaluated"] == 60


def test_mask_and_ties_change_the_file_and_the_figures(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mask", "none", "--ties", "pessimistic", "--cutoffs", "[3]"]
    figures, shown = evaluated(trained, capsys, "test-full-none-pessimistic", *flags)
    assert figures["header"]["mask"] == "none"
    assert "HR@3" in shown
    assert "HR@10" not in figures


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--protocl", "full"], "unknown setting --protocl: did you mean --protocol?"),
        (["--protocol", "sampled"], "--protocol sampled: expected one of full, sampled-100, candidates-20"),
        (["--cutoffs", "[]"], "--cutoffs []: expected at least one"),
        (["--cutoffs", "[0]"], "--cutoffs [0]: expected at least one, each at least 1"),
        (["--batch_size", "0"], "--batch_size 0: expected at least 1"),
    ],
)
def test_mistakes_are_one_line(trained: Path, flags: list[str], answer: str) -> None:
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--run", str(trained), *flags])
    assert str(exit.value.code).startswith(f"error: {answer}")


def test_a_catalogue_that_is_too_small_for_a_protocol(tmp_path: Path) -> None:
    flags = "--model=sasrec --data.source=sample --data.sample_users=9 --data.sample_series=9 --train.max_steps=1"
    assert train.main([*flags.split(), "--train.trackers=[]", f"--output={tmp_path}"]) == 0
    with pytest.raises(SystemExit, match=r"^error: user \d+ has \d+ unseen items, --protocol sampled-100 draws 100"):
        evaluate.main(["--run", str(tmp_path), "--protocol=sampled-100"])


def test_a_run_must_be_named() -> None:
    with pytest.raises(SystemExit, match="--run"):
        evaluate.main([])
