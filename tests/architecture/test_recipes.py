"""Every recipe and every Accelerate configuration that is shipped loads and says what its name says."""

import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from launch.config import parse
from launch.methods import METHODS

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RECIPES = sorted((LAUNCH / "recipes").rglob("*.yaml"))
ACCELERATE = sorted((LAUNCH / "accelerate").glob("*.yaml"))


def test_recipes_and_configurations_are_shipped() -> None:
    assert RECIPES
    assert {"cpu", "ddp"} <= {path.stem for path in ACCELERATE}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_parses(path: Path) -> None:
    config = parse(["--recipe", str(path)])
    assert config.model in METHODS
    assert path.stem.startswith(config.model), f"recipes/<dataset>/<method>.yaml names {config.model} inside"
    assert config.data.source == path.parent.name


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_configuration_loads(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    assert config.num_processes >= 1


PROBE = """
import torch
from accelerate import Accelerator, PartialState

PartialState(cpu=True)
accelerator = Accelerator()
total = accelerator.reduce(torch.tensor(accelerator.process_index + 1.0)).item()
if accelerator.is_main_process:
    print(f"{accelerator.distributed_type.value} {accelerator.num_processes} {total}")
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("cpu", "NO 1 1.0"), ("ddp", "MULTI_CPU 2 3.0")])
def test_accelerate_configuration_starts_its_processes(name: str, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"{LAUNCH}/accelerate/{name}.yaml",
    ]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == expected
