"""Evaluating a run again: the same figures as its own, other protocols under their names, files left behind."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.protocols import candidates_hash
from evaluation.results import read_ranks
from launch import evaluate, train
from launch.setting import Built


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


def test_several_draws_of_candidates(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each draw is the evaluation of its seed alone; the figures are their mean and spread."""
    alone = "test-candidates-20-full-history-expected"
    flags = ["--protocol", "candidates-20"]
    figures, shown = evaluated(trained, capsys, f"{alone}-3-draws", *flags, "--draws", "3", "--seed", "4")
    each = []
    for draw, seed in zip(figures["draws"], (4, 5, 6), strict=True):
        single, _ = evaluated(trained, capsys, alone, *flags, "--seed", str(seed))
        each.append(single["candidates-20/HR@1"])
        assert draw["candidates-20/HR@1"] == each[-1]
        assert draw["header"]["candidates_hash"] == single["header"]["candidates_hash"]
        kept = read_ranks(trained / "evaluations" / f"{alone}-seed{seed}.parquet")
        assert kept.candidates.shape == (60, 20)
        assert np.array_equal(kept.candidates[:, 0], kept.ranks.target)
        assert candidates_hash(kept.candidates) == draw["header"]["candidates_hash"] == kept.header["candidates_hash"]
    assert len(set(each)) > 1
    assert figures["candidates-20/HR@1"] == pytest.approx(np.mean(each))
    assert figures["spread"]["candidates-20/HR@1"] == pytest.approx(np.std(each, ddof=1))
    popularity = [draw["candidates-20/HR@1"] for draw in figures["popularity"]["draws"]]
    assert figures["popularity"]["candidates-20/HR@1"] == pytest.approx(np.mean(popularity))
    assert f"{np.mean(each):.4f}" in shown
    assert " ".join(f"{figure:.4f}" for figure in each) in shown


def test_whole_catalogues_keep_no_candidates(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(trained, capsys, "test-full-full-history-expected")
    assert read_ranks(trained / "evaluations" / "test-full-full-history-expected.parquet").candidates is None


def test_methods_that_show_candidates_are_given_those_of_the_evaluator() -> None:
    given = []
    plain = Built(None, None, lambda split, phase: (split, phase))
    offering = dataclasses.replace(plain, offering=lambda *arguments: given.append(arguments))
    candidates = np.ones((2, 20), dtype=np.int64)
    assert plain.evaluation_among("split", "test", candidates) == ("split", "test")
    assert offering.evaluation_among("split", "test", None) == ("split", "test")
    offering.evaluation_among("split", "test", candidates)
    assert given == [("split", "test", candidates)]


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--protocl", "full"], "unknown setting --protocl: did you mean --protocol?"),
        (["--protocol", "sampled"], "--protocol sampled: expected one of full, sampled-100, candidates-20"),
        (["--cutoffs", "[]"], "--cutoffs []: expected at least one"),
        (["--cutoffs", "[0]"], "--cutoffs [0]: expected at least one, each at least 1"),
        (["--batch_size", "0"], "--batch_size 0: expected at least 1"),
        (["--draws", "2"], "--draws 2: expected at least 1, and more only with candidates (--protocol)"),
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
