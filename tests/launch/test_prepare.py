"""Preparing ahead: what is reported is what is on disk, and the training that follows builds nothing again."""

import io
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console

from data import tokenized
from data.tokenized import PromptReport
from launch import prepare, recommend, train

SMALL = (
    "--model bigrec --data.source sample --data.sample_users 40 --data.sample_series 8 --backbone.tiny.hidden_size 32 "
    "--backbone.tiny.layers 1 --backbone.tiny.heads 2 --backbone.tiny.vocab_size 512 --train.max_steps 2 "
    "--train.batch_size 8 --train.micro_batch_size 4 --train.trackers [] --train.precision fp32"
).split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(cache: Path) -> Path:
    assert prepare.main([*SMALL, f"--data.cache={cache}"]) == 0
    return cache


def datasets(cache: Path) -> dict[str, Dataset]:
    return {str(path): Dataset.from_file(str(path)) for path in (cache / "prompts").glob("*/prompts.arrow")}


def test_the_table_says_what_is_on_disk(cache: Path, capsys: pytest.CaptureFixture[str], prepared: Path) -> None:
    capsys.readouterr()
    assert prepare.main([*SMALL, f"--data.cache={cache}"]) == 0
    shown = capsys.readouterr().out
    assert "sample: 40 users, 48 items, " in shown
    rows = {row[0]: row for row in map(str.split, shown.splitlines()) if row and row[0] in prepare.PHASES}
    found = datasets(cache)
    assert len(found) == 3
    (training,) = [prompts for prompts in found.values() if "row" not in prompts.column_names]
    tokens, context = sum(training["length"]), sum(training["context"])
    assert rows["train"][1:4] == [f"{n:,}" for n in (len(training), tokens, tokens - context)]
    lengths = sorted(training["length"])
    padded = sum(max(lengths[i : i + 4]) * len(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    assert rows["train"][4] == f"{1 - tokens / padded:.1%}", "of micro-batches of 4"
    assert rows["valid"][1] == rows["test"][1] == "40"
    assert str(cache / "prompts") in shown


def test_counts_of_twenty_million_prompts_fit_into_a_terminal() -> None:
    report = PromptReport(
        rows=19_586_060,
        tokens=1_701_850_780,
        label_tokens=93_301_610,
        padding_share=0.004,
        shortened_rows=0,
        bytes_on_disk=7_203_000_000,
        seconds=61.2,
    )
    console = Console(width=80, file=io.StringIO())
    console.print(prepare.prompt_table({"train": report}))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for figure in ("19,586,060", "1,701,850,780", "93,301,610", "7203.0", "61.2 s"):
        assert figure in shown


def test_training_finds_everything(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "_build", lambda *_: pytest.fail("built again"))
    run = tmp_path / "run"
    assert train.main([*SMALL, f"--data.cache={prepared}", f"--output={run}"]) == 0
    before = sorted(prepared.rglob("*"))
    # What somebody types is not kept among the prepared prompts.
    assert recommend.main(["--run", str(run), "--user", "1", "-k", "3"]) == 0
    assert sorted(prepared.rglob("*")) == before


def test_no_model_is_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.methods.load_backbone", lambda *_, **__: pytest.fail("loaded a model"))
    assert prepare.main([*SMALL, f"--data.cache={cache}", "--method.prompts.window=7"]) == 0


def test_a_method_without_prompts_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--model=sasrec", "--data.source=sample", "--data.sample_users=40", f"--data.cache={tmp_path}"]
    assert prepare.main(flags) == 0
    shown = capsys.readouterr().out
    assert "sasrec trains on item ids: there are no prompts to prepare" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.split()[:1] == ["test"]] == ["40"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--method.prompts.max_length=9"], "longer than --method.prompts.max_length 9"),
        (["--data.source=no-such-set"], "--data.source no-such-set: no such file"),
        (["--train.epoch=3"], "did you mean --train.epochs?"),
        (["--backbone.name=./no/such/folder"], "--backbone.name ./no/such/folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, flags: list[str], answer: str) -> None:
    with pytest.raises(SystemExit) as exit:
        prepare.main([*SMALL, f"--data.cache={tmp_path}", *flags])
    assert str(exit.value.code).startswith("error: ")
    assert answer in str(exit.value.code)
