"""One small SASRec run on `sample`, trained once a process through launch/train.py, for all tests of this folder."""

from pathlib import Path

import pytest

from launch import train
from tests.conftest import forget_accelerator

FLAGS = (
    "--model sasrec --data.source sample --data.sample_users 60 --data.sample_series 40 --method.window 12 "
    "--method.hidden_size 16 --method.num_blocks 1 --train.trackers [] --train.epochs 3 --train.batch_size 16 "
    "--train.lr 0.01 --train.precision fp32"
).split()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    forget_accelerator()
    folder = tmp_path_factory.mktemp("runs") / "sasrec"
    assert train.main([*FLAGS, f"--output={folder}"]) == 0
    return folder
