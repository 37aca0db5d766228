"""What a person sees at the end: every shown figure is the one in results.json, titles are as they are."""

import json
import shutil
from pathlib import Path

import pytest

from launch.run_folder import RunFolder
from launch.show import show_results


def test_a_finished_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_results(RunFolder(trained))
    shown = capsys.readouterr().out
    results = json.loads((trained / "results.json").read_text())
    for metric in ("HR@1", "HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR@10"):
        (row,) = [line for line in shown.splitlines() if f"│ {metric} " in line]
        low, high = results["test"]["intervals"][metric]
        figures = f"{results['popularity'][metric]:.4f} │ {results['test'][metric]:.4f} │ {low:.4f} to {high:.4f}"
        assert figures in row
    assert "Precision@" not in shown
    assert results["split"]["hash"][:12] in shown
    assert f"full ranking of {results['split']['items']} items, 60 users, mask full-history" in " ".join(shown.split())
    assert len(results["examples"]) == 3
    for example in results["examples"]:
        assert f"user {example['user']}, last: {'; '.join(example['history'])}" in shown
        assert f"  1. {example['recommended'][0]}" in shown


@pytest.fixture
def altered(trained: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(trained, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_titles_are_no_markup_and_the_held_out_one_is_marked(
    altered: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    results = altered.results()
    titles = {"history": ["[rec] (2007)"], "held_out": "[/b] (1999)", "recommended": ["Heat (1995)", "[/b] (1999)"]}
    altered.write_results(results | {"examples": [{"user": "[7]", **titles}]})
    show_results(altered)
    shown = capsys.readouterr().out
    assert "user [7], last: [rec] (2007)" in shown
    assert "  1. Heat (1995)\n  2. [/b] (1999)  <- held out\n" in shown


def test_parts_of_a_model_have_columns(altered: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    results = altered.results()
    part = results["test"] | {"NDCG@10": 0.98765}
    altered.write_results(results | {"parts": {"retriever": {"valid": {}, "test": part}}})
    show_results(altered)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "│ NDCG@10 " in line]
    assert f"│ {results['test']['NDCG@10']:.4f} │" in row
    assert row.split("│")[-2].strip() == "0.9877"


def test_figures_of_a_protocol(altered: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    results = altered.results()
    for part in ("test", "popularity"):
        for figures in (results[part], results[part]["intervals"]):
            for name in [name for name in figures if "@" in name]:
                figures[f"sampled-100/{name}"] = figures.pop(name)
    altered.write_results(results)
    show_results(altered)
    assert (
        f"│ sampled-100/NDCG@10 │     {results['popularity']['sampled-100/NDCG@10']:.4f} │" in capsys.readouterr().out
    )
