"""Two processes train the first stage of UR4Rec like one; its second is a row of the strategies' table."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.grid import save_small_backbone
from tests.distributed.test_strategies import environment, finish
from tests.runs import losses, run, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_is_built")]
FLAGS = (
    "--model ur4rec-pretrain --data.source sample --data.sample_users 60 --data.sample_series 40 --train.trackers [] "
    "--train.precision fp32 --train.batch_size 16 --train.lr 0.003 --train.max_steps 6 --train.log_every_steps 1 "
    "--train.eval_every_steps 3 --train.eval_batch_size 7 --method.hidden_size 16 --method.preferences.hidden_size 32 "
    "--method.preferences.dropout 0"
).split()


def test_two_processes_are_one(tmp_path: Path) -> None:
    backbone = save_small_backbone(tmp_path / "backbone")
    flags = [*FLAGS, f"--method.preferences.encoder={backbone}", f"--data.cache={tmp_path / 'cache'}"]
    one = run(*flags, output=tmp_path / "one")
    assert one.process.exitcode == 0, one.text()
    finish(start_ranks(*flags, output=tmp_path / "two", environment=environment("zero3", tmp_path)))
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(theirs) == 6
    for name in ("loss", "loss/contrastive", "loss/matching", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], atol=2e-5)
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert ours["valid"] == pytest.approx(theirs["valid"], abs=1e-5)
