"""Two hosts train like one, with the commands of docs/scaling.md; and a job that cannot go on ends, and says why."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from benchmarks.processes import ROOT, start_ranks
from tests.hosts import PATH, SECONDS, Host, Job, start_node
from tests.runs import SMALL, losses, results, validations

EXACT = [*SMALL, "--method.dropout=0"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("deepspeed_is_built")]


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


def test_the_deepspeed_launcher_trains_two_hosts_alike(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Its own way to start a host, without ssh; it passes --local_rank to the script."""
    settings = [*EXACT, "--train.max_steps=6"]
    config = ROOT / "ds_configs/zero2.json"
    one_host = start_ranks(*settings, output=tmp_path / "one", before=UnderZero(config))
    assert [rank.wait() for rank in one_host] == [0, 0], one_host[0].text() + one_host[1].text()

    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    environment = {
        "PATH": PATH,
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config),
    }
    nodes = [
        host.start(
            *("deepspeed", f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={rank}"),
            *(f"--master_addr={hosts[0].address}", "launch/train.py", *settings, f"--output={tmp_path / 'two'}"),
            log=tmp_path / f"node-{rank}.log",
            environment=environment,
        )
        for rank, host in enumerate(hosts)
    ]
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text() + nodes[1].text()
    assert "ZeRO-2, 2 processes" in nodes[0].text()
    assert "--local_rank=0" in nodes[1].text()
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    assert results(tmp_path / "two") == results(tmp_path / "one")


@pytest.mark.parametrize(
    ("rank", "joined", "remedy"),
    [
        (0, "1/2 clients joined", "check that every host runs this script, each with a NODE_RANK of its own"),
        (1, "host 1 of 2 could not reach 10.77.0.1 port 29500 for 10 s", "Check that host 0 runs this script"),
    ],
)
def test_a_host_that_stays_alone_says_so(
    hosts: tuple[Host, Host], tmp_path: Path, rank: int, joined: str, remedy: str
) -> None:
    alone = start_node(hosts[rank], rank, *EXACT, output=tmp_path / "run", log=tmp_path / "node.log", JOIN_SECONDS="10")
    assert alone.wait(60) != 0
    assert joined in alone.text()
    assert remedy in alone.text()
    assert not (tmp_path / "run").exists()


def test_a_pulled_cable_ends_both_hosts(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """No connection breaks then, so nobody is told: each side has to notice that it has heard nothing."""
    folder, endless = tmp_path / "run", ["--train.epochs=1000", "--train.eval_every_epochs=1000"]
    nodes = [
        start_node(
            *(host, rank, *EXACT, *endless, "--train.timeout_seconds=20"),
            output=folder,
            log=tmp_path / f"node-{rank}.log",
        )
        for rank, host in enumerate(hosts)
    ]
    wait_for_steps(folder, nodes)
    hosts[1].pull_cable()
    for node in nodes:
        assert node.wait(60) != 0
        assert "goes on from the last checkpoint" in node.text()


def wait_for_steps(folder: Path, nodes: list[Job]) -> None:
    """Return once the hosts train."""
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.is_file() and metrics.read_text().count("\n") > 1):
        assert all(node.process.poll() is None for node in nodes), nodes[0].text() + nodes[1].text()
        assert time.monotonic() < deadline, nodes[0].text() + nodes[1].text()
        time.sleep(0.2)


def test_hosts_that_would_train_alone_are_refused(tmp_path: Path) -> None:
    """Without `standard`, Accelerate calls the deepspeed command, which finds no host file and one host: this one."""
    launch = yaml.safe_load((ROOT / "launch/accelerate/multinode.yaml").read_text())
    del launch["deepspeed_config"]["deepspeed_multinode_launcher"]
    config = tmp_path / "multinode.yaml"
    config.write_text(yaml.safe_dump(launch))
    numbers = (
        "--num_machines=2 --machine_rank=1 --main_process_ip=10.77.0.1 --main_process_port=29500 --num_processes=2"
    )
    command = ["accelerate", "launch", f"--config_file={config}", *numbers.split(), f"{ROOT}/launch/train.py"]
    environment = {
        "PATH": PATH,
        "DS_ACCELERATOR": "cpu",
        "DS_ENV_FILE": str(tmp_path / "env"),  # where Accelerate writes the environment down, for other hosts
        "SHARDREC_WORLD_SIZE": "2",
    }
    done = subprocess.run(
        [*command, *EXACT, f"--output={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode != 0
    assert "2 processes were asked for, but 1 joined" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NUM_NODES": ""}, "NUM_NODES is '', expected the number of hosts"),
        ({"NODE_RANK": "one"}, "NODE_RANK is 'one', expected this host's number, from 0"),
        ({"NODE_RANK": "2"}, "NODE_RANK is 2, but the last of NUM_NODES=2 hosts is 1"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set, expected the name or address of host 0"),
        ({"PROCESSES_PER_NODE": "0"}, "PROCESSES_PER_NODE is 0, but must be at least 1"),
        ({"CONFIG": "launch/accelerate/zero9.yaml"}, "CONFIG is launch/accelerate/zero9.yaml, which is not a file"),
    ],
)
def test_the_script_says_what_it_misses(variables: dict[str, str], message: str) -> None:
    complete = {"NODE_RANK": "0", "NUM_NODES": "2", "MASTER_ADDR": "10.77.0.1", "PROCESSES_PER_NODE": "1"}
    environment = os.environ | complete | variables
    done = subprocess.run([ROOT / "launch/multinode.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
