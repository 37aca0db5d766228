"""Where figures are written: sections of documents that a command owns, and the hardware beside them."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from launch.run_folder import PACKAGES, describe_processor


def write_section(document: Path, command: str, text: str) -> None:
    """Replace what stands between `<!-- table of COMMAND -->` and `<!-- end of table -->` in a document."""
    begin, end = f"<!-- table of {command} -->", "<!-- end of table -->"
    before, found, rest = document.read_text().partition(begin)
    if not found:
        raise ValueError(f"{document} has no line {begin}")
    document.write_text(f"{before}{begin}\n\n{text.rstrip()}\n\n{end}{rest.partition(end)[2]}")


def hardware() -> dict[str, Any]:
    """Return the processor or GPU, the threads, and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": f"cuda: {gpu}" if gpu else f"cpu: {describe_processor()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
