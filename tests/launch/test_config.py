"""Settings from defaults, recipes and flags: what wins, what is refused in one line, and the way back from a file."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import config
from launch.config import RunConfig, build_parser, dump, parse
from launch.methods import METHODS


def refusal(argv: list[str]) -> str:
    """Return the one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as exit:
        parse(argv)
    message = exit.value.code
    assert isinstance(message, str), "a message, not a page of usage and a number"
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write YAML files, each with a path of its own."""

    def write(text: str) -> str:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        file.write_text(text)
        return str(file)

    return write


# --- Mistakes ---


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        ("--train.epoch 3", "--train.epochs"),
        ("--train.epoch=3", "--train.epochs"),
        ("--trian.epochs 3", "--train.epochs"),
        ("--epochs 3", "--train.epochs"),
        ("--batch_size 3", "--train.batch_size"),
        ("--lr 1", "--train.lr"),
        ("--source sample", "--data.source"),
        ("--data.sorce sample", "--data.source"),
        ("--data.columns.usr x", "--data.columns.user"),
        ("--data.batch_size 3", "--train.batch_size"),
        ("--method.prompts.windw 3", "--method.prompts.window"),
        ("--backbone.tiny.hiden_size 3", "--backbone.tiny.hidden_size"),
        ("--model sasrec --method.hiden_size 3", "--method.hidden_size"),
        ("--train.trackrs+=wandb", "--train.trackers"),
    ],
)
def test_an_unknown_flag_names_the_closest(flags: str, meant: str) -> None:
    assert re.search(rf"unknown setting --[\w.]+: did you mean {re.escape(meant)}\?$", refusal(flags.split()))


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ("--train.zzz adam", "known: train.epochs, train.max_steps, "),
        ("--model sasrec --backbone.name tiny", "known: help, model, "),
        ("--gpus 3", "known: help, model, "),
    ],
)
def test_an_unknown_flag_that_is_like_none_lists_the_known(flags: str, known: str) -> None:
    assert known in refusal(flags.split())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("train:\n  epocs: 3", "unknown setting train.epocs: did you mean train.epochs?"),
        ("train.epocs: 3", "unknown setting train.epocs: did you mean train.epochs?"),
        ("trian:\n  epochs: 3", "unknown setting trian: did you mean train?"),
        (
            "method:\n  prompts:\n    windw: 3",
            "unknown setting method.prompts.windw: did you mean method.prompts.window?",
        ),
        ("model: sasrec\nbackbone:\n  name: tiny", "unknown setting backbone; known: "),
        ("train: 3", "train is 3; expected settings below it, such as train.epochs"),
        ("train:", "train is None; expected settings below it"),
        ("- a\n- b", "holds no settings"),
        ("just text", "holds no settings"),
        ("", "holds no settings"),
        ("a: [b", "is not YAML"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_setting(write: Any, text: str, answer: str) -> None:
    file = write(text)
    message = refusal(["--recipe", file])
    assert message.startswith(f"error: {file}")
    assert answer in message


def test_a_file_that_cannot_be_read() -> None:
    assert refusal(["--recipe", "no/such.yaml"]).startswith("error: cannot read no/such.yaml: No such file")
    assert "--config needs the path" in refusal(["--config"])


@pytest.mark.parametrize("name", ["bigrek", "BIGRec", "bigrecs"])
def test_an_unknown_model_names_the_closest_and_all(write: Any, name: str) -> None:
    expected = f"error: --model {name}: expected one of {', '.join(METHODS)} (did you mean bigrec?)"
    assert refusal(["--model", name]) == expected
    assert refusal(["--recipe", write(f"model: {name}")]) == expected
    assert "did you mean" not in refusal(["--model", "transformer"])


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--train.epochs many", "--train.epochs many: expected a whole number"),
        ("--train.epochs 1.5", "--train.epochs 1.5: expected a whole number"),
        ("--train.lr fast", "--train.lr fast: expected a number"),
        ("--train.max_steps None", "--train.max_steps None: expected a whole number or null"),
        ("--train.schedule cosin", "--train.schedule cosin: expected one of constant, linear, cosine"),
        ("--train.group_by_length maybe", "--train.group_by_length maybe: expected one of step, epoch"),
        ("--train.betas 0.9", "--train.betas 0.9: expected a list such as [0.9,0.999]"),
        ("--train.betas [0.9]", "--train.betas [0.9]: expected a list such as [0.9,0.999]"),
        ("--train.trackers wandb", "--train.trackers wandb: expected a list such as [tensorboard]"),
        ("--backbone.lora_targets q_proj", "--backbone.lora_targets q_proj: expected a list such as [a,b] or null"),
        ("--train.epochs", "--train.epochs: expected one argument"),
        ("--model", "--model: expected one argument"),
        ("epochs=3", "unrecognized arguments: epochs=3"),
        # Settings that only together are wrong, and those that a dataclass refuses itself.
        ("--train.epochs 0", "--train.epochs is 0, but must be at least 1"),
        ("--method.prompts.template alpaca", "--method.prompts.template 'alpaca': expected one of"),
        ("--backbone.tiny.hidden_size 100", "--backbone.tiny.hidden_size 100 must be"),
        ("--backbone.adapter lora", "--backbone.adapter lora does not go with --backbone.name tiny"),
        (
            "--backbone.name some/model --backbone.adapter moe-lora",
            "and bigrec makes none: pass --backbone.adapter lora",
        ),
        ("--model sasrec --method.hidden_size 65 --method.num_heads 2", "hidden_size 65"),
        ("--train.metric NDCG@7", "--train.metric NDCG@7: expected HR, Recall, NDCG, MRR"),
        ("--evaluation.cutoffs [1,5]", "--train.metric NDCG@10: expected HR, Recall, NDCG, MRR"),
        ("--evaluation.cutoffs []", "--evaluation.cutoffs []: expected at least one"),
        ("--evaluation.cutoffs [0,10]", "--evaluation.cutoffs [0, 10]: expected at least one, each at least 1"),
    ],
)
def test_a_wrong_value_says_what_was_expected(flags: str, answer: str) -> None:
    assert answer in refusal(flags.split())


def test_a_wrong_value_in_a_file_says_what_was_expected(write: Any) -> None:
    assert refusal(["--recipe", write("train:\n  epochs: many")]).endswith("train.epochs many: expected a whole number")
    assert "must be at least 1" in refusal(["--recipe", write("train:\n  epochs: 0")])


# --- What wins ---


def test_flags_win_over_files_and_later_files_over_earlier_ones(write: Any) -> None:
    first, second = write("train: {epochs: 3, lr: 0.5, seed: 1}"), write("train: {lr: 0.25, seed: 2}")
    before_and_after = ["--train.seed=9", f"--recipe={first}", "--config", second, "--train.batch_size", "4"]
    train = parse(before_and_after).train
    assert (train.epochs, train.lr, train.seed, train.batch_size) == (3, 0.25, 9, 4)


def test_names_that_are_the_users_own_are_read_from_a_file(write: Any) -> None:
    text = "train:\n  lr_multipliers:\n    gate: 0.3\n    backbone.embed: 2\n  frozen_epochs: {input.learned: 3}"
    train = parse(["--recipe", write(text)]).train
    assert train.lr_multipliers == {"gate": 0.3, "backbone.embed": 2.0}
    assert train.frozen_epochs == {"input.learned": 3}


def test_the_model_is_taken_from_flags_then_files(write: Any) -> None:
    recipe = write("model: sasrec\ntrain:\n  epochs: 3")
    assert parse(["--recipe", recipe]).model == "sasrec"
    assert parse(["--recipe", recipe, "--model", "bigrec"]).model == "bigrec"
    assert parse([]).model == "bigrec"
    assert parse(["--model=sasrec"]).backbone is None


def test_a_shipped_recipe_is_used_only_when_no_file_is_named(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "RECIPES", tmp_path)
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "sasrec.yaml").write_text("model: sasrec\ndata: {source: sample}\ntrain: {epochs: 77}\n")
    asked = ["--model", "sasrec", "--data.source", "sample"]
    assert parse(asked).train.epochs == 77
    assert parse([*asked, "--train.epochs=3"]).train.epochs == 3
    assert parse([*asked, "--recipe", write("train: {lr: 0.5}")]).train.epochs != 77
    assert parse(["--model", "bigrec", "--data.source", "sample"]).train.epochs != 77


def test_output_and_paths() -> None:
    assert parse(["--model=sasrec", "--data.source=/data/ml-1m"]).output == Path("runs/ml-1m-sasrec")
    config = parse(["--output=~/runs/x", "--data.root=~/data"])  # a shell leaves ~ alone behind =
    assert (config.output, config.data.root) == (Path.home() / "runs/x", Path.home() / "data")


# --- And back ---

CHANGED = {
    "sasrec": "--method.norm pre --method.feed_forward_size 7 --method.loss gbce",
    "bigrec": "--method.prompts.mode response --method.prompts.template bigrec-movie --method.prompts.few_shot 1024 "
    "--method.num_beams 3 --backbone.name a/folder --backbone.lora_targets [q_proj,v_proj] --backbone.dtype bfloat16",
}
EVERYWHERE = (
    "--data.source 2020 --data.root some/where --data.columns.user who --train.max_steps 9 --train.betas [0.5,0.75] "
    "--train.lr 1e-5 --train.trackers [] --train.patience null --evaluation.cutoffs [3,10] "
    '--train.group_by_length epoch --train.lr_multipliers {"backbone":0.1,"backbone.layers":0.5}'
)


@pytest.mark.parametrize("model", METHODS)
@pytest.mark.parametrize("changed", [False, True])
def test_a_run_folders_config_gives_the_same_configuration(model: str, changed: bool, tmp_path: Path) -> None:
    flags = [*CHANGED.get(model, "").split(), *EVERYWHERE.split()] if changed else []
    first = parse(["--model", model, *flags])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dump(first), sort_keys=False))
    again = parse(["--config", str(file), f"--output={first.output}"])
    assert again == first
    assert isinstance(again, RunConfig)
    if changed:
        assert again != parse(["--model", model])
        assert again.evaluation.cutoffs == (3, 10)


# Of a method without backbone, where it is not the window of histories.
OWN_SETTING = {
    "ensemble": "method.members",
    "dllm2rec-gru4rec": "method.student.num_layers",
    "dllm2rec-lrurec": "method.student.min_decay",
    "dllm2rec-sasrec": "method.student.num_heads",
    "ur4rec": "method.retriever",
    "ur4rec-pretrain": "method.history_length",
    "ur4rec-v2": "method.cuts",
}


@pytest.mark.parametrize("model", METHODS)
def test_help_says_what_every_setting_does(model: str) -> None:
    parser = build_parser(model)
    shown = " ".join(parser.format_help().partition("\noptions:")[2].split())
    assert set(parser.types) >= {
        "data.source",
        "backbone.name" if METHODS[model].has_backbone else OWN_SETTING.get(model, "method.window"),
        "train.epochs",
    }
    for name in parser.types:
        values = r"(?:[A-Z_]+|\[ITEM,\.\.\.\]|\{[^}]*\})"
        (text,) = re.findall(rf"--{re.escape(name)}\+? {values} (.{{12}})", shown)
        assert not text.startswith("(type"), f"--{name} has no text under its field"


def test_printed_settings_are_a_recipe(capsys: pytest.CaptureFixture[str], write: Any) -> None:
    flags = ["--model=sasrec", "--train.epochs=7", "--evaluation.cutoffs=[3,10]"]
    with pytest.raises(SystemExit) as exit:
        parse([*flags, "--print_config"])
    assert exit.value.code == 0
    assert parse(["--recipe", write(capsys.readouterr().out)]) == parse(flags)
