"""Every strategy trains, saves, resumes and evaluates like one process. `make grid` walks all cells; these are some.

Every row and every column of the grid has one here.
"""

import os
from pathlib import Path

import pytest

from benchmarks.grid import STRATEGIES, environment, loss_difference
from benchmarks.grid_rows import ROWS, bound, save_inputs, settings
from benchmarks.processes import Run, run, start_ranks
from tests.runs import losses, results, validations

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_is_built")]
CELLS = [
    ("sasrec float32", "zero1"),
    ("sasrec bf16", "zero2_offload"),
    ("gru4rec float32", "zero3"),
    ("lrurec float32", "zero3"),
    ("dllm2rec-sasrec float32", "zero3"),
    ("bigrec float32", "zero3"),
    ("bigrec bf16, checkpointing", "zero3_offload"),
    ("bigrec LoRA float32, one prompt a title", "zero3"),
    ("bigrec LoRA 4-bit", "zero3"),
    ("bigrec LoRA 8-bit", "zero2"),
    ("e4srec float32", "zero3"),
    ("e4srec bf16, checkpointing", "ddp"),
    ("e4srec LoRA 4-bit", "zero3_offload"),
    ("dense-retrieval float32", "ddp"),
    ("dense-retrieval float32", "zero2"),
    ("dense-retrieval float32", "zero3"),
    ("dense-retrieval float32, GradCache", "zero3"),
    ("dense-retrieval LoRA 4-bit, checkpointing", "zero3"),
    ("mntp float32", "zero3"),
    ("simcse float32", "zero2"),
    ("llara float32", "zero3"),
    ("llara LoRA 4-bit, checkpointing", "ddp"),
    ("ilora-items MoE-LoRA float32", "ddp"),
    ("ilora-items MoE-LoRA float32", "zero3"),
    ("ilora-items MoE-LoRA 4-bit, checkpointing", "zero3"),
    ("llamarec float32", "zero3"),
    ("llamarec LoRA 4-bit, vectors, checkpointing", "zero3"),
    ("ilora MoE-LoRA float32", "ddp"),
    ("ilora MoE-LoRA 4-bit, checkpointing", "zero2"),
    ("rankllm float32", "zero3"),
    ("rankllm LoRA 4-bit, checkpointing", "zero1"),
    ("ur4rec-pretrain float32", "zero3"),
    ("ur4rec float32", "zero3"),
    ("ur4rec-v2 float32", "ddp"),
    ("ur4rec-v2 float32", "zero3"),
    ("ur4rec-v2 bf16", "zero2"),
    ("ensemble float32", "ddp"),
]
STEPS = 8
SHORT = ["--train.log_every_steps=1", "--train.save_every_steps=4", "--train.schedule=constant"]


def test_every_row_and_column_has_a_cell() -> None:
    rows, strategies = zip(*CELLS, strict=True)
    assert set(rows) == set(ROWS)
    assert {*strategies, "one"} == set(STRATEGIES)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder


def finish(ranks: list[Run]) -> None:
    codes = [rank.wait() for rank in ranks]
    assert codes == [0] * len(ranks), ranks[0].text()[-3000:] + ranks[-1].text()[-3000:]


@pytest.mark.parametrize(("row", "strategy"), CELLS, ids=[f"{row}, {strategy}" for row, strategy in CELLS])
def test_a_strategy_trains_like_one_process_and_resumes(inputs: Path, tmp_path: Path, row: str, strategy: str) -> None:
    flags = [*settings(row, inputs), *SHORT]
    one = run(*flags, f"--train.max_steps={STEPS}", output=tmp_path / "one")
    assert one.process.exitcode == 0, one.text()
    for steps in (STEPS // 2, STEPS):
        ranks = start_ranks(
            *flags,
            f"--train.max_steps={steps}",
            output=tmp_path / "two",
            environment=environment(strategy, tmp_path),
        )
        finish(ranks)
    assert "resuming" in ranks[0].text()
    assert loss_difference(tmp_path / "two", tmp_path / "one") <= bound(row)
    if "float32" in row:
        # By the last weights: which step was best may differ, for only the run in two parts was validated in between.
        ours, theirs = validations(tmp_path / "two")[-1], validations(tmp_path / "one")[-1]
        # Candidates' figures say so in their name, and stages that rank nothing have a loss.
        (metric,) = (name for name in theirs if name.endswith("NDCG@10") or name == "valid/loss")
        assert ours[metric] == pytest.approx(theirs[metric], abs=0.005)
        assert results(tmp_path / "two")["parameters"] == results(tmp_path / "one")["parameters"]


def test_a_run_goes_from_strategy_to_strategy(tmp_path: Path) -> None:
    """Checkpoints hold whole tensors: two steps each under another stage, with DDP, and alone.

    The blocks are clipped alone, to a norm so small that AdamW's epsilon holds them back: a wrong one would show.
    """
    row, chain = "sasrec float32", ("zero3", "zero1", "one", "zero3_offload", "ddp", "zero2_offload")
    flags = [*settings(row, tmp_path), *SHORT, '--train.max_grad_norms={"blocks": 1e-6}']
    whole = run(*flags, f"--train.max_steps={2 * len(chain)}", output=tmp_path / "whole")
    assert whole.process.exitcode == 0, whole.text()
    for i, strategy in enumerate(chain, start=1):
        ranks = start_ranks(
            *flags,
            f"--train.max_steps={2 * i}",
            output=tmp_path / "run",
            processes=1 if strategy == "one" else 2,
            environment=environment(strategy, tmp_path),
        )
        finish(ranks)
    assert loss_difference(tmp_path / "run", tmp_path / "whole") <= bound(row)
    norms = [[line["grad_norm"] for line in losses(tmp_path / name)] for name in ("run", "whole")]
    assert norms[0] == pytest.approx(norms[1], abs=1e-5), "of all weights, before clipping"


def test_weights_are_really_spread(tmp_path: Path) -> None:
    """ZeRO-3 leaves each of two processes half of every weight, and nothing frozen among what it saves."""
    ranks = start_ranks(
        *settings("bigrec float32", tmp_path),
        "--train.max_steps=1",
        output=tmp_path / "run",
        before=_print_bytes,
        environment=environment("zero3", tmp_path),
    )
    finish(ranks)
    for rank in ranks:
        (line,) = [line for line in rank.text().splitlines() if line.startswith("own and whole: ")]
        own, whole = map(int, line.removeprefix("own and whole: ").split())
        assert whole / 2 <= own <= whole / 2 + 100, "padding is a few numbers a parameter at most"


def _print_bytes(rank: int) -> None:
    from trainers.loop import Trainer

    train = Trainer.train

    def print_and_train(self):
        parameters = list(self.runtime.unwrap(self.model).parameters())
        own = sum(p.ds_tensor.numel() for p in parameters)
        print("own and whole:", own, sum(p.ds_numel for p in parameters), flush=True)
        assert all(p.numel() == 0 for p in parameters), "no whole weight stays between steps"
        return train(self)

    Trainer.train = print_and_train  # type: ignore[method-assign]


def test_another_accumulation_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}')
    ranks = start_ranks(
        *settings("sasrec float32", tmp_path),
        output=tmp_path / "run",
        environment={"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)},
    )
    assert all(rank.wait() for rank in ranks)
    assert "gradient_accumulation_steps 4" in ranks[0].text()
    assert "--train.micro_batch_size" in ranks[0].text()
    assert os.listdir(tmp_path / "run") == [".lock"] or not (tmp_path / "run" / "checkpoints").exists()


def _infinite_gradient(rank: int) -> None:
    from models.sasrec import SASRec

    loss = SASRec.loss

    def with_infinite_slope(self, batch):
        out = loss(self, batch)
        nothing = self.final_norm.bias[0] * 0  # on both: under ZeRO-3 reading it is collective
        return out._replace(total=out.total + (nothing.sqrt() if rank == 1 else nothing))  # 0, of infinite slope

    SASRec.loss = with_infinite_slope  # type: ignore[method-assign]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_both(tmp_path: Path, strategy: str) -> None:
    """DeepSpeed hides it in the norm; nothing that came of it may be saved."""
    ranks = start_ranks(
        *settings("sasrec float32", tmp_path),
        "--train.save_every_steps=1",
        output=tmp_path / "run",
        before=_infinite_gradient,
        environment=environment(strategy, tmp_path),
    )
    assert [rank.wait() for rank in ranks] == [1, 1], ranks[0].text() + ranks[1].text()
    assert "step 1 has loss" in ranks[0].text()
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
