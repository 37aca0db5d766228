"""Where tests find data, golden vectors and small backbones; a missing folder skips with its name."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: one thread each for the parallel test processes, and no test talks to a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

SHARED = Path(__file__).resolve().parents[2] / "shared"

Golden = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="session", autouse=True)
def one_thread_per_worker() -> None:
    """Keep pytest-xdist's processes from fighting over cores, and sums in the same order on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Each test is a start of its own: Accelerate keeps one precision for the life of a process."""
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with real data sets: $SHARDREC_DATA, else ../shared/data."""
    return _folder("SHARDREC_DATA", "data")


@pytest.fixture(scope="session")
def backbone_root() -> Path:
    """The folder with small pre-trained backbones: $SHARDREC_BACKBONES, else ../shared/backbones."""
    return _folder("SHARDREC_BACKBONES", "backbones")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """golden(item) -> (meta.json, tensors by name) from $SHARDREC_GOLDEN, else ../shared/golden.

    Tensors of `tensors.safetensors` keep their names; those of any other file, say `steam.safetensors`,
    begin with its name: `steam.item_embeddings.weight`.
    """

    def load(item: str) -> Golden:
        folder = _folder("SHARDREC_GOLDEN", "golden") / item
        if not folder.is_dir():
            pytest.skip(f"no golden vectors for {item}: {folder} does not exist (set SHARDREC_GOLDEN)")
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            prefix = "" if file.stem == "tensors" else f"{file.stem}."
            tensors |= {prefix + name: tensor for name, tensor in load_file(file).items()}
        return json.loads((folder / "meta.json").read_text()), tensors

    return load


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A fresh folder for prepared prompts, so no test reads an earlier one's: DataConfig(cache=cache)."""
    return tmp_path / "cache"


def _folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable) or SHARED / name).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: set {variable} to a folder laid out like it")
    return folder
