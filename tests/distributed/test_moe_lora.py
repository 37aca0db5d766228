"""The gated adapter over two processes: BIGRec with a gate from what its prompt holds stands in for a method."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.grid import environment, loss_difference
from benchmarks.grid_rows import bound, settings
from benchmarks.processes import run, start_ranks
from tests.distributed.test_strategies import SHORT, finish
from tests.distributed.test_strategies import inputs as inputs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_is_built")]
STATE_SIZE = 8
# A gate belongs to a row, so no tokens can be run for all rows at once.
GATED = ["--backbone.adapter=moe-lora", "--method.share_start=false"]


def give_bigrec_a_gate(kind: Any, rank: int = 0) -> None:
    """Run in a process of a launch before its command."""
    import launch.methods as methods
    from models.base import Loss
    from models.bigrec import BIGRec
    from models.expert_gates import ExpertGate, GateConfig, gate_parts
    from models.moe_lora import gate_of

    class GatedBIGRec(BIGRec):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            torch.manual_seed(0)
            active = gate_of(self.backbone)
            self.gate = ExpertGate(GateConfig(kind), STATE_SIZE, active.num_experts, active.num_layers)
            self.saved_buffers = (*self.saved_buffers, *(f"gate.{name}" for name in self.gate.saved_buffers))

        def loss(self, batch: Any) -> Loss:
            gate = self.gate(state(batch.input_ids))
            with gate_of(self.backbone).use(gate):
                loss = super().loss(batch)
            return loss._replace(parts=gate_parts(gate, batch.count))

        def scores(self, batch: Any) -> Tensor:
            print("statistics:", [float(self.get_buffer(name).sum()) for name in self.saved_buffers], flush=True)
            with gate_of(self.backbone).use(self.gate(state(batch.input_ids))):
                return super().scores(batch)

    def state(ids: Tensor) -> Tensor:
        """Some function of the prompt that padding, token 0, does not change."""
        return torch.sin(ids.sum(1, keepdim=True) * torch.arange(1, STATE_SIZE + 1, device=ids.device))

    methods.BIGRec = GatedBIGRec  # type: ignore[misc]
    methods.METHODS["bigrec"] = replace(methods.METHODS["bigrec"], makes_gate=True)


@pytest.mark.parametrize(
    ("row", "strategy", "extra"),
    [
        ("bigrec LoRA float32, one prompt a title", "zero3", []),
        ("bigrec LoRA 4-bit", "zero3", ["--backbone.gradient_checkpointing=true"]),
        ("bigrec LoRA 4-bit", "ddp", ["--backbone.gradient_checkpointing=true"]),
    ],
)
def test_a_strategy_trains_like_one_process_and_resumes(
    inputs: Path, tmp_path: Path, row: str, strategy: str, extra: list[str]
) -> None:
    flags = [*settings(row, inputs), *SHORT, *extra, *GATED]
    before = partial(give_bigrec_a_gate, "mlp")
    one = run(*flags, "--train.max_steps=6", output=tmp_path / "one", before=before)
    assert one.process.exitcode == 0, one.text()
    for steps in (4, 6):
        world = environment(strategy, tmp_path)
        ranks = start_ranks(
            *flags, f"--train.max_steps={steps}", output=tmp_path / "two", before=before, environment=world
        )
        finish(ranks)
    assert "resuming" in ranks[0].text()
    assert loss_difference(tmp_path / "two", tmp_path / "one") <= bound(row)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_processes_evaluate_with_the_running_statistics_that_are_saved(
    inputs: Path, tmp_path: Path, strategy: str
) -> None:
    """Each process's batch norm has seen other batches; all of them go on with the main one's."""
    ranks = start_ranks(
        *settings("bigrec LoRA float32, one prompt a title", inputs),
        *(*SHORT, *GATED, "--train.max_steps=4"),
        output=tmp_path / "run",
        before=partial(give_bigrec_a_gate, "resnet"),
        environment=environment(strategy, tmp_path),
    )
    finish(ranks)
    seen = [{line for line in rank.text().splitlines() if line.startswith("statistics:")} for rank in ranks]
    assert len(seen[0]) == 1
    assert seen[0] == seen[1]
