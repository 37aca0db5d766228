"""UR4Rec learns the planted structure of `sample` from texts and lists: well above chance in both stages."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.processes import run
from tests.runs import results

# Measured: contrastive 2.17 where guessing gives log(11) = 2.40; NDCG@10 .67 where guessing among 20 gives .23.
COMMON = (
    "--data.source sample --data.sample_users 300 --data.sample_series 20 --train.precision fp32 --train.trackers [] "
    "--train.batch_size 64 --train.lr 0.003 --method.cuts 8 --method.history_length 3 --method.hidden_size 32 "
    "--method.preferences.hidden_size 32 --method.preferences.num_proxies 4"
).split()
LISTS = "--evaluation.protocol candidates-20 --method.num_candidates 20 --method.ranker sasrec --train.epochs 6".split()


@pytest.mark.slow
def test_both_stages_learn(tmp_path: Path, backbone_root: Path) -> None:
    flags = [*COMMON, f"--data.cache={tmp_path}", f"--method.preferences.encoder={backbone_root / 'stories260k'}"]
    first = run("--model=ur4rec-pretrain", *flags, "--train.epochs=6", output=tmp_path / "first")
    assert first.process.exitcode == 0, first.text()
    found = json.loads((first.folder / "results.json").read_text())["valid"]
    assert found["contrastive"] < math.log(11) - 0.1
    second = run("--model=ur4rec", *flags, *LISTS, f"--method.init={first.folder}", output=tmp_path / "second")
    assert second.process.exitcode == 0, second.text()
    measured = results(second.folder)
    assert measured["test"]["candidates-20/NDCG@10"] > 0.55
    assert measured["popularity"]["candidates-20/NDCG@10"] < 0.45
