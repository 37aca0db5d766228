"""Two hosts train like one, with the commands of docs/scaling.md; and a job that cannot go on ends, and says why."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.hosts import Host, Job, two_hosts
from tests.runs import ROOT, SMALL, losses, results, start_ranks, validations

EXACT = [*SMALL, "--method.dropout=0"]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@dataclass(frozen=True)
class Configuration:
    """One strategy for several hosts: a DeepSpeed file, and an Accelerate file that names it."""

    deepspeed: Path
    accelerate: Path


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def configuration(request: pytest.FixtureRequest, tmp_path: Path) -> Configuration:
    return make_configuration(request.param, tmp_path)


def make_configuration(stage: int, folder: Path) -> Configuration:
    settings = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    if stage == 3:  # or models as small as these are left whole
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    made = Configuration(folder / f"zero{stage}.json", folder / "multinode.yaml")
    made.deepspeed.write_text(json.dumps(settings))
    launch = yaml.safe_load((ROOT / "launch/accelerate/multinode.yaml").read_text())
    launch["deepspeed_config"]["deepspeed_config_file"] = str(made.deepspeed)
    made.accelerate.write_text(yaml.safe_dump(launch))
    return made


def start_node(
    host: Host, rank: int, *arguments: str, output: Path, log: Path, config: Path | None = None, **variables: str
) -> Job:
    """Run launch/multinode.sh as the `rank`-th of two hosts with one process each."""
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "NODE_RANK": str(rank),
        "NUM_NODES": "2",
        "MASTER_ADDR": "10.77.0.1",
        "PROCESSES_PER_NODE": "1",
    }
    if config is not None:
        environment["CONFIG"] = str(config)
    command = ("launch/multinode.sh", *arguments, f"--output={output}")
    return host.start(*command, log=log, environment=environment | variables)


@dataclass(frozen=True)
class UnderZero:
    """Gives a process the environment in which `accelerate launch` starts DeepSpeed."""

    config: Path

    def __call__(self, rank: int) -> None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(self.config)


def test_two_hosts_train_like_one_with_two_processes(
    hosts: tuple[Host, Host], configuration: Configuration, tmp_path: Path
) -> None:
    """The same numbers to the last bit: gloo adds two processes' tensors alike, wherever they are."""
    one_host = start_ranks(*EXACT, output=tmp_path / "one", before=UnderZero(configuration.deepspeed))
    assert [rank.wait() for rank in one_host] == [0, 0], one_host[0].text() + one_host[1].text()

    folder = tmp_path / "two"
    nodes = [
        start_node(
            host, rank, *EXACT, output=folder, log=tmp_path / f"node-{rank}.log", config=configuration.accelerate
        )
        for rank, host in enumerate(hosts)
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text() + nodes[1].text()
    assert f"ZeRO-{configuration.deepspeed.stem[-1]}, 2 processes" in nodes[0].text()
    assert "ready for the first batch" not in nodes[1].text(), "one process speaks"

    assert len(losses(folder)) == 6
    assert losses(folder) == losses(tmp_path / "one")
    assert validations(folder) == validations(tmp_path / "one")
    assert results(folder) == results(tmp_path / "one")
