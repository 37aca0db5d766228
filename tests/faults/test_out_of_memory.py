"""A run that does not fit says what would, and can go on with it."""

import resource
from pathlib import Path

import pytest

from benchmarks.processes import run
from tests.runs import SMALL, losses

WIDE = "--method.feed_forward_size=300000"  # [8 rows, 11 events, 300,000] float32 is 106 MB, and there are several
ROOM = 500 * 2**20  # more than the weights and their moments take, less than they and such a pass do


def _little_memory() -> None:
    """Leave room for a micro-batch of a few rows."""
    import deepspeed  # noqa: F401 (loaded by the forecast: its code is not what the limit is for)

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.slow
def test_a_run_without_room_names_flags_that_fit(tmp_path: Path) -> None:
    stopped = run(*SMALL, WIDE, "--train.micro_batch_size=16", output=tmp_path / "run", before=_little_memory)
    assert stopped.process.exitcode == 1, stopped.text()
    assert "out of memory on rank 0" in stopped.text()
    assert "can't allocate memory" in stopped.text()
    assert "the same command goes on" in stopped.text()
    assert not (tmp_path / "run/results.json").exists()
    again = run(*SMALL, WIDE, "--train.micro_batch_size=1", "--train.max_steps=3", output=tmp_path / "run")
    assert again.process.exitcode == 0, again.text()
    assert losses(tmp_path / "run")
