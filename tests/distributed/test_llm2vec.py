"""Two processes train the stages of LLM2Vec like one, and measure the same loss on what is held out."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_strategies import environment, finish
from tests.runs import losses, run, start_ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_is_built")]
FLAGS = (
    "--data.source sample --data.sample_users 60 --data.sample_series 40 --backbone.tiny.hidden_size 32 "
    "--backbone.tiny.layers 2 --backbone.tiny.heads 2 --backbone.dropout 0 --train.trackers [] --train.precision fp32 "
    "--train.batch_size 16 --train.lr 0.003 --train.max_steps 6 --train.log_every_steps 1 --train.eval_every_steps 3 "
    "--method.texts.held_out 9 --train.eval_batch_size 4"
).split()


# simcse tells a text from those of one pass of all processes: of 16 rows on one process, and of 8 on each of two.
@pytest.mark.parametrize(("model", "strategy"), [("mntp", "ddp"), ("mntp", "zero3"), ("simcse", "zero2")])
def test_two_processes_are_one(tmp_path: Path, model: str, strategy: str) -> None:
    flags = ["--model", model, *FLAGS]
    one = run(*flags, output=tmp_path / "one")
    assert one.process.exitcode == 0, one.text()
    finish(start_ranks(*flags, output=tmp_path / "two", environment=environment(strategy, tmp_path)))
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(theirs) == 6
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in ours], [line[name] for line in theirs], atol=2e-5)
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    if model == "mntp":  # a pass of simcse on held-out texts is 4 rows a process, so two have more negatives
        assert ours["valid"] == pytest.approx(theirs["valid"], abs=1e-5)
    assert ours["training"] == theirs["training"]
