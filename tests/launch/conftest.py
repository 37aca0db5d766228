"""One small SASRec run on `sample`, trained once a process through launch/train.py, for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from launch import train

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


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Each test is a start of its own: Accelerate keeps one precision for the life of a process."""
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
