"""The report, from run folders on disk to tables, figures and one page that needs nothing else."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from data.cold_items import with_cold_items
from data.config import DataConfig
from data.sources import read
from data.splits import Split, split
from evaluation.evaluator import Evaluator, evaluate_popularity
from evaluation.report import build_report, write_report
from evaluation.results import write_ranks
from launch.report import main


class Rows(NamedTuple):
    row: Tensor


@pytest.fixture(scope="module")
def sample() -> Split:
    config = DataConfig(source="sample", sample_users=120)
    return split(read(config), config)


def write_run(folder: Path, sample: Split, skill: float, seed: int = 0) -> Path:
    """A complete run folder of a model that knows the target the better, the higher its skill."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(sample.test.user), sample.num_items + 1, generator=generator)
    scores[torch.arange(len(scores)), torch.from_numpy(sample.target_items("test"))] += skill
    evaluation = Evaluator(sample, "test").run(lambda batch: scores[batch.row], [Rows(torch.arange(len(scores)))])
    write_ranks(evaluation, folder / "ranks" / "test.parquet")
    steps = [{"step": step, "epoch": 0, "loss": 5 / step, "lr": 1e-3, "samples_per_s": 100.0} for step in range(1, 301)]
    validation = [{"step": step, "epoch": 0, "valid/NDCG@10": step / 1000} for step in (100, 200, 300)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps + validation))
    (folder / "config.yaml").write_text("model: sasrec\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    results = {
        "model": "sasrec",
        "dataset": sample.name,
        "split": {"hash": sample.hash},
        "test": evaluation.as_results(),
        "popularity": evaluate_popularity(sample, "test").as_results(),
        "timing": {"train_seconds": 3725.0, "samples_per_s": 98765.4},
        "parameters": {"total": 1_234_567, "trainable": 98_304},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_runs_are_compared_on_the_same_split(sample: Split, tmp_path: Path) -> None:
    weak = write_run(tmp_path / "weak", sample, 0.5)
    strong = write_run(tmp_path / "strong", sample, 3.0, seed=1)
    [section] = build_report([weak, strong]).sections
    headline = section.tables[0]
    cells = {row[0]: dict(zip(headline.columns, row, strict=True)) for row in headline.rows}
    assert list(cells) == ["weak", "strong", "popularity"]
    results = json.loads((strong / "results.json").read_text())
    low, high = results["test"]["intervals"]["HR@10"]
    assert cells["strong"]["HR@10"] == f"{results['test']['HR@10']:.4f} [{low:.4f}, {high:.4f}]"
    assert cells["popularity"]["NDCG@10"].startswith(f"{results['popularity']['NDCG@10']:.4f} [")
    assert cells["strong"]["p"] == "< 0.001"
    assert cells["strong"]["Δ NDCG@10"].startswith("+")
    assert cells["weak"]["p"] == "-"
    assert cells["weak"]["training"] == "1 h 02 min"
    assert cells["weak"]["samples/s"] == "98.8k"
    assert cells["weak"]["parameters (trained)"] == "1.2M (98.3k)"


def test_seeds_are_tested_together(sample: Split, tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"{name}-seed{seed}", sample, skill, seed=10 * seed + len(name))
        for name, skill in (("weak", 0.5), ("strong", 3.0))
        for seed in (1, 2)
    ]
    elsewhere = write_run(tmp_path / "other" / "weak-seed1", sample, 1.0)
    alone = write_run(tmp_path / "alone", sample, 1.0)
    [section] = build_report([*runs, alone, elsewhere, runs[0]]).sections
    table = section.tables[1]
    assert table.title == "Seeds together"
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    expected = [("weak", "2"), ("strong", "2"), ("alone", "1"), ("weak-seed1", "1")]
    assert [(row["runs"], row["seeds"]) for row in rows] == expected, "one name in one place, and no run twice"
    weak, strong = rows[:2]
    found = [json.loads((run / "results.json").read_text())["test"]["HR@10"] for run in runs[2:]]
    assert strong["HR@10"] == f"{sum(found) / 2:.4f} ± {abs(found[0] - found[1]) / 2**0.5:.4f}"
    assert (weak["p"], strong["p"]) == ("-", "< 0.001")
    assert float(strong["Δ NDCG@10"].split()[0]) > 0
    assert [table.title for table in build_report([runs[0], runs[2]]).sections[0].tables] == ["", "All cutoffs"]


def test_other_splits_and_protocols_have_tables_of_their_own(sample: Split, tmp_path: Path) -> None:
    other_split = replace(sample, hash="f" * 64)
    folders = [
        write_run(tmp_path / "one", sample, 1.0),
        write_run(tmp_path / "two", other_split, 1.0),
        write_run(tmp_path / "three", sample, 1.0),
        write_run(tmp_path / "unmasked", sample, 1.0),
    ]
    results = json.loads((folders[3] / "results.json").read_text())
    results["test"]["header"]["mask"] = "none"
    (folders[3] / "results.json").write_text(json.dumps(results))
    sections = build_report(folders).sections
    runs = [[row[0] for row in section.tables[0].rows[:-1]] for section in sections]
    assert runs == [["one", "three"], ["two"], ["unmasked"]]
    assert len({plot.name for section in sections for plot in section.plots}) == 6


def test_new_items_have_a_table_where_there_are_any(sample: Split, tmp_path: Path) -> None:
    [warm] = build_report([write_run(tmp_path / "warm", sample, 1.0)]).sections
    assert [table.title for table in warm.tables] == ["", "All cutoffs"]
    catalog = read(DataConfig(source="sample", sample_users=120)).catalog
    cold = with_cold_items(sample, catalog, 0.1, seed=0)
    run = write_run(tmp_path / "cold", cold, 3.0)
    table = build_report([run]).sections[0].tables[-1]
    slices = json.loads((run / "results.json").read_text())["test"]["slices"]
    assert table.title == "New items"
    assert [row[1:3] for row in table.rows] == [
        ["items that training has not seen", str(slices["cold"]["targets"])],
        ["all other items", str(slices["warm"]["targets"])],
        ["items that training has not seen, ranked among each other", str(slices["cold"]["targets"])],
    ]
    assert [row[3][:6] for row in table.rows] == [f"{part['HR@10']:.4f}" for part in slices.values()]


def damage_nothing_but_log(folder: Path) -> None:
    for part in ("results.json", "config.yaml", "environment.json", "ranks/test.parquet"):
        (folder / part).unlink()


def truncate_results(folder: Path) -> None:
    (folder / "results.json").write_text('{"model": "sas')


def leave_out_test(folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps({"model": "sasrec", "split": {"hash": "f"}}))


def put_null_for_split(folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps({"model": "sasrec", "split": None, "test": {"HR@10": 0.1}}))


def empty(folder: Path) -> None:
    damage_nothing_but_log(folder)
    (folder / "metrics.jsonl").write_text("")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_nothing_but_log, "results.json; environment.json; config.yaml; ranks/test.parquet"),
        (truncate_results, "results.json (Unterminated string"),
        (leave_out_test, "results.json has no test metrics"),
        (put_null_for_split, "results.json has no usable 'split'"),
        (empty, "results.json; environment.json; config.yaml; ranks/test.parquet"),
    ],
)
def test_an_incomplete_run_is_listed_with_what_it_lacks(sample: Split, tmp_path: Path, damage, named) -> None:
    whole = write_run(tmp_path / "whole", sample, 1.0)
    crashed = write_run(tmp_path / "crashed", sample, 1.0)
    damage(crashed)
    report = build_report([crashed, whole])
    compared, incomplete = report.sections
    assert [row[0] for row in compared.tables[0].rows] == ["whole", "popularity"]
    [row] = incomplete.tables[0].rows
    assert row[0] == "crashed"
    assert named in row[-1]
    write_report(report, tmp_path / "report")


def test_a_broken_last_line_does_not_hide_the_log(sample: Split, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "killed", sample, 1.0)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 301, "lo')
    [run] = build_report([folder]).runs
    assert len(run.training) == 300
    assert run.missing == ["metrics.jsonl line 304 is not a JSON object"]


def test_missing_ranks_are_a_note_not_a_failure(sample: Split, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, sample, 1.0) for name in ("first", "second")]
    (folders[1] / "ranks" / "test.parquet").unlink()
    [section] = build_report(folders).sections
    assert section.tables[0].rows[1][5:7] == ["-", "-"]
    assert "second is not tested against first" in section.notes[0]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        self.links += [str(value) for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_command_writes_a_page_that_needs_nothing_else(sample: Split, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("<b>first", "second"):
        write_run(tmp_path / "runs" / name, sample, 1.0)
    (tmp_path / "runs" / "notes.txt").write_text("not a run")
    main([*map(str, sorted((tmp_path / "runs").iterdir())), "--to", str(tmp_path / "report")])

    html = (tmp_path / "report" / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert len(page.links) == 4
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in page.links)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html
    assert "&lt;b&gt;first" in html
    assert "<b>first" not in html

    markdown = (tmp_path / "report" / "report.md").read_text()
    images = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert images == ["comparison-1.png", "curves-1.png"]
    for image in images:
        assert (tmp_path / "report" / image).read_bytes().startswith(b"\x89PNG")
    assert "second" in capsys.readouterr().out


def test_the_command_refuses_to_report_on_nothing(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent")])
    assert "no run folder among" in capsys.readouterr().err
