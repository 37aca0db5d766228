"""iLoRA's items over two processes: a recommender inside that is trained, its shared table, gate and distillation."""

from pathlib import Path

import pytest

from benchmarks.grid import COMMON, LRUREC, bound, loss_difference, save_small_backbone
from tests.distributed.test_strategies import SHORT, environment, finish
from tests.runs import run, start_ranks, validations

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_is_built")]
GATED = ["--backbone.adapter=moe-lora", "--backbone.lora_dropout=0"]
TRAINED = ["--method.train_sasrec=true", "--method.space=sasrec", "--method.distillation=mse"]
QUANTISED = ["--backbone.quantization=4bit", "--backbone.gradient_checkpointing=true", "--method.distillation=kl"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lrurec"  # of the three, the one with a weight that only scores
    done = run(*LRUREC, *COMMON, "--train.precision=fp32", "--train.max_steps=20", output=folder)
    assert done.process.exitcode == 0, done.text()
    return folder


@pytest.mark.parametrize(
    ("row", "strategy", "extra"),
    [
        ("float32", "zero3", [*GATED, *TRAINED, "--train.precision=fp32"]),
        ("float32", "ddp", [*GATED, *TRAINED, "--train.precision=fp32"]),
        ("4-bit, checkpointing", "zero3", [*GATED, *QUANTISED, "--train.precision=bf16"]),
    ],
)
def test_a_strategy_trains_like_one_process_and_resumes(
    backbone: Path, recommender: Path, tmp_path: Path, row: str, strategy: str, extra: list[str]
) -> None:
    flags = ["--model=ilora-items", f"--method.sasrec={recommender}", "--method.prompts.max_history=12"]
    flags += [f"--backbone.name={backbone}", *extra, *COMMON, *SHORT]
    one = run(*flags, "--train.max_steps=6", output=tmp_path / "one")
    assert one.process.exitcode == 0, one.text()
    for steps in (4, 6):
        world = environment(strategy, tmp_path)
        ranks = start_ranks(*flags, f"--train.max_steps={steps}", output=tmp_path / "two", environment=world)
        finish(ranks)
    assert "resuming" in ranks[0].text()
    assert loss_difference(tmp_path / "two", tmp_path / "one") <= bound(row)
    ours, theirs = validations(tmp_path / "two")[-1], validations(tmp_path / "one")[-1]
    assert ours["step"] == theirs["step"] == 6
    assert ours["valid/NDCG@10"] == pytest.approx(theirs["valid/NDCG@10"], abs=0.005)
