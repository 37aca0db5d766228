"""What DeepSpeed compiles on a CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import PATH

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_is_built")]
COMPILE = "from trainers.zero import compile_for_cpu; compile_for_cpu(); import os; print(os.environ['{}'])"
FOLDER = "TORCH_EXTENSIONS_DIR"


def compiled(**environment: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(FOLDER)],
        env=os.environ | {"PATH": PATH, "DS_ACCELERATOR": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def test_a_compilation_that_was_killed_does_not_hold_up_later_runs(tmp_path):
    shutil.copytree(compiled(), tmp_path / "extensions")
    left = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    left.touch()  # torch's sign that somebody is compiling; torch itself would wait for its end forever
    compiled(**{FOLDER: str(tmp_path / "extensions")})
    assert not left.exists()
