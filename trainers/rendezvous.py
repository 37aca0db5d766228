"""Where the processes of a run meet, and what is wrong when they do not."""

import os
import re
from datetime import timedelta

from torch.distributed import DistError, DistStoreError, Store
from torch.distributed.rendezvous import rendezvous

CHECK = (
    "Check that every host runs the same command, with the same --num_machines, --num_processes, --main_process_ip and "
    "--main_process_port, and with a --machine_rank of its own (0 on the host of --main_process_ip); that a firewall "
    "lets the port through; and raise --train.timeout_seconds where hosts start later than that"
)


def meet(timeout: float) -> Store:
    """Return a connection of our own to the store of the rendezvous that the launcher's environment names.

    Works with the launcher's own store and with one that rank 0 hosts. Raises `DistStoreError` when not all
    processes came within `timeout` seconds; the message says how many did, and what to check.
    """
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
    except DistError as error:
        asked, rank = os.environ["WORLD_SIZE"], os.environ["RANK"]
        if (joined := re.search(r"(\d+)/\d+ clients joined", str(error))) is not None:
            what = f"{joined[1]} of {asked} processes came to the rendezvous at {endpoint()} within {timeout:g} s"
        else:
            what = f"rank {rank} of {asked} has not reached the rendezvous at {endpoint()} within {timeout:g} s"
        raise DistStoreError(f"{what}. {CHECK}") from error
    return store


def endpoint() -> str:
    """Return host:port of the rendezvous."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
