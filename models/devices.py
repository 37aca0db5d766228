"""Which device a process has, and what processes tell each other without it."""

import functools
import os
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from torch import distributed

AnyObject = TypeVar("AnyObject")


def runs_on_cpu() -> bool:
    """Whether there is no accelerator, or the launch leaves it alone (`--cpu`, `use_cpu: true`)."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def own_device() -> torch.device:
    """Return this process's device: the accelerator of its rank on this host, or the CPU.

    Asking Accelerate joins the launch, which whoever only loads a run may not want, or not yet.
    """
    if runs_on_cpu():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def gather_object(own: list[AnyObject]) -> list[AnyObject]:
    """Return the lists of all processes as one, in their order. Collective.

    It goes from host to host: NCCL would take memory of the GPU for everything that all processes tell, at once.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return own
    everyone: list[list[AnyObject]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, own, group=_group_of_hosts())
    return [told for share in everyone for told in share]


@functools.cache
def _group_of_hosts() -> distributed.ProcessGroup | None:
    if distributed.get_backend() == "gloo":
        return None
    # Who waits too long is for trainers/watchdog.py to say.
    return distributed.new_group(backend="gloo", timeout=timedelta(days=1))
