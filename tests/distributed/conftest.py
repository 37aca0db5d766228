"""What tests of several hosts share."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.hosts import PATH, Host, two_hosts


@pytest.fixture(scope="module")
def deepspeed_is_built() -> None:
    """On a CPU DeepSpeed compiles one operation when first used, in a minute: not within a test's time."""
    environment = os.environ | {"PATH": PATH, "DS_ACCELERATOR": "cpu"}
    compile = "from trainers.zero import compile_for_cpu; compile_for_cpu()"
    subprocess.run([sys.executable, "-c", compile], env=environment, check=True, capture_output=True, timeout=280)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both
