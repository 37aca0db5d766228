"""The example of a host file is one that DeepSpeed reads."""

from deepspeed.launcher.runner import fetch_hostfile

from benchmarks.processes import ROOT


def test_deepspeed_reads_the_example() -> None:
    assert fetch_hostfile(str(ROOT / "launch/hostfile.example")) == {"worker-0": 8, "worker-1": 8}
