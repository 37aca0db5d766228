"""What to do when a run does not fit: flags that would, by forecast."""

import os

import torch

from trainers.runtime import Runtime

from .config import RunConfig


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU, or the host, has no room left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def explain(error: BaseException, config: RunConfig, runtime: Runtime, num_items: int, longest: int) -> str:
    """Return what is wrong and the flags that the forecast of launch/plan.py says would fit, cheapest first.

    `longest` is the longest training row in tokens (or events).
    """
    from .fitting import flags_that_would_fit  # takes seconds to import (bitsandbytes, torch's compiler)

    what = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
    room = memory_bytes(runtime.device)
    found = flags_that_would_fit(config, num_items, longest, runtime.share.num_processes, room, runtime.strategy_name)
    advice = "; or ".join(found) or "no flags that launch/plan.py knows of, or as it is, were nobody else using memory"
    return (
        f"out of memory on rank {runtime.share.process_index} ({runtime.device}, {room / 2**30:.1f} GiB): {what}\n"
        f"By forecast, these would fit: {advice}\nThe last checkpoint is whole: with a smaller "
        "--train.micro_batch_size the same command goes on from it"
    )


def memory_bytes(device: torch.device) -> int:
    """Return a GPU's memory, or the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
