"""Every Accelerate and DeepSpeed configuration loads in the library that reads it, and names files that exist."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DeepSpeedPlugin

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = sorted((ROOT / "launch/accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))


def test_all_strategies_are_shipped() -> None:
    zero = {"zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}
    assert {path.stem for path in DEEPSPEED} == zero
    assert {path.stem for path in ACCELERATE} == zero | {"cpu", "ddp", "multinode"}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_configuration_names_a_deepspeed_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    is_deepspeed = path.stem.startswith(("zero", "multinode"))
    assert (config.distributed_type.value == "DEEPSPEED") == is_deepspeed
    if is_deepspeed:
        named = config.deepspeed_config["deepspeed_config_file"]
        assert (ROOT / named).is_file()
        assert Path(named).stem == {"multinode": "zero2"}.get(path.stem, path.stem)
        assert not config.use_cpu, "it would turn DeepSpeed off"


def test_several_hosts_use_the_launcher_that_joins_them() -> None:
    config = load_config_from_file(str(ROOT / "launch/accelerate/multinode.yaml"))
    assert config.num_machines > 1
    assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_configuration_loads(path: Path) -> None:
    plugin = DeepSpeedPlugin(hf_ds_config=str(path))
    assert plugin.zero_stage == int(path.stem.removeprefix("zero")[0])
    offload = json.loads(path.read_text())["zero_optimization"].keys() & {"offload_optimizer", "offload_param"}
    assert bool(offload) == path.stem.endswith("_offload")
    # Or DeepSpeed compiles an optimizer of its own for the CPU.
    assert not offload or plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] is False


def test_the_readme_names_every_configuration() -> None:
    readme = (ROOT / "ds_configs/README.md").read_text()
    assert all(f"`{path.stem}`" in readme for path in DEEPSPEED)
