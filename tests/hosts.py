"""Two hosts on one machine: network namespaces, joined by a cable (a veth pair), that share the file system."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.processes import ROOT

SECONDS = 200  # a job that takes longer hangs; 20 are usual
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CABLE = "eth0"  # each host's end of it


@dataclass
class Job:
    """What runs on one host."""

    process: subprocess.Popen
    log: Path

    def wait(self, seconds: float = SECONDS) -> int:
        """Return the exit code; `two_hosts` ends what is left."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds} s:\n{self.text()}") from None

    def text(self) -> str:
        return self.log.read_text()


@dataclass(frozen=True)
class Host:
    """A namespace with an address, and the cores that its processes may use."""

    name: str
    address: str
    cores: str

    def start(self, *command: str | Path, log: Path, environment: dict[str, str] | None = None) -> Job:
        """Start a command here."""
        inside = ["ip", "netns", "exec", self.name, "taskset", "--cpu-list", self.cores, *map(str, command)]
        everything = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE} | (environment or {})
        with log.open("w") as output:
            process = subprocess.Popen(inside, cwd=ROOT, env=everything, stdout=output, stderr=subprocess.STDOUT)
        return Job(process, log)

    def pull_cable(self) -> None:
        _ip("-n", self.name, "link", "set", CABLE, "down")

    def _remove(self) -> None:
        """End every process in the namespace, and it with its end of the cable."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Have two hosts, one core each; skip the test where the kernel does not allow to make them."""
    if not (shutil.which("ip") and shutil.which("taskset")):
        pytest.skip("no `ip` (iproute2) or `taskset` (util-linux) here, which make hosts of network namespaces")
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    unique = f"shardrec-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    hosts = tuple(Host(f"{unique}-{i}", f"10.77.0.{i + 1}", cores[i % len(cores)]) for i in range(2))
    try:
        try:
            for host in hosts:
                _ip("netns", "add", host.name)
            first, second = hosts
            # Made inside the namespaces, so neither its names nor its addresses meet those of the machine.
            _ip("link", "add", CABLE, "netns", first.name, "type", "veth", "peer", "name", CABLE, "netns", second.name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here (root or CAP_NET_ADMIN): {error.stderr.strip()}")
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
            for device in (CABLE, "lo"):
                _ip("-n", host.name, "link", "set", device, "up")
        yield first, second
    finally:
        for host in hosts:
            host._remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def start_node(
    host: Host, rank: int, *arguments: str, output: Path, log: Path, config: Path | None = None, **variables: str
) -> Job:
    """Run launch/multinode.sh as the `rank`-th of two hosts with one process each."""
    environment = {
        "PATH": PATH,
        "NODE_RANK": str(rank),
        "NUM_NODES": "2",
        "MASTER_ADDR": "10.77.0.1",
        "PROCESSES_PER_NODE": "1",
    }
    if config is not None:
        environment["CONFIG"] = str(config)
    command = ("launch/multinode.sh", *arguments, f"--output={output}")
    return host.start(*command, log=log, environment=environment | variables)
