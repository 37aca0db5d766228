"""A run's numbers do not depend on what earlier runs have left in the cache."""

from pathlib import Path

import pytest

from benchmarks.grid_rows import ROWS, save_inputs, settings
from benchmarks.processes import launched
from tests.runs import losses

READ_FROM_THE_CACHE = [row for row, flags in ROWS.items() if "--data.cache" in flags and "float32" in row]
READ_FROM_THE_CACHE += ["llamarec LoRA 4-bit, vectors, checkpointing"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder


@pytest.mark.parametrize("row", READ_FROM_THE_CACHE)
def test_the_first_run_is_the_second(inputs: Path, tmp_path: Path, row: str) -> None:
    flags = [*settings(row, inputs), f"--data.cache={tmp_path / 'cache'}", "--train.max_steps=2"]
    for name in ("first", "second"):
        launched(*flags, output=tmp_path / name)
    assert any((tmp_path / "cache").iterdir())
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
