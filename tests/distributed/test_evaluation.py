"""Two real gloo processes and one process must give the same evaluation to the last bit."""

import os
import pickle
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, multiprocessing

from data.config import DataConfig
from data.sources import read
from data.splits import Split, split
from evaluation.evaluator import Evaluator, evaluate_popularity
from evaluation.protocols import Protocol
from evaluation.results import Evaluation

PROCESSES = 2
PROTOCOLS: tuple[Protocol, ...] = ("full", "sampled-100")


class Rows(NamedTuple):
    row: Tensor


def sample() -> Split:
    config = DataConfig(source="sample", sample_users=101)
    return split(read(config), config)


def evaluate(share: slice, protocol: Protocol, also: list[int]) -> Evaluation:
    """Rank every row of `share`, and the rows in `also` again, as a padding sampler would."""
    data = sample()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(data.test.user), data.num_items + 1, generator=generator).mul(2).round()
    rows = torch.cat([torch.arange(len(scores))[share], torch.tensor(also, dtype=torch.int64)])
    evaluator = Evaluator(data, "test", protocol=protocol)
    return evaluator.run(lambda batch: scores[batch.row], map(Rows, rows.split(16)))


def process(rank: int, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(PROCESSES),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(1 + rank),  # the threads must not matter either
    )
    state = PartialState(cpu=True, backend="gloo")
    assert state.num_processes == PROCESSES
    # Shares of unequal size, and the second process repeats rows of the first.
    share, also = (slice(0, 70), []) if rank == 0 else (slice(70, None), [0, 1, 2])
    outcome: dict[str, object] = {protocol: evaluate(share, protocol, also) for protocol in PROTOCOLS}
    outcome["popularity"] = evaluate_popularity(sample(), "test")
    outcome["all by the first"] = evaluate(slice(None) if rank == 0 else slice(0, 0), "full", [])
    try:
        evaluate(slice(0, 60) if rank == 0 else slice(63, None), "full", [])
    except ValueError as error:
        outcome["missing"] = str(error)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(outcome))
    state.destroy_process_group()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_same(ours: Evaluation, reference: Evaluation) -> None:
    assert ours.metrics == reference.metrics
    assert ours.intervals == reference.intervals
    assert np.array_equal(ours.recommendations, reference.recommendations)
    for name, column in vars(reference.ranks).items():
        assert np.array_equal(getattr(ours.ranks, name), column)
    varying = {"world_size", "seconds"}
    assert {entry: value for entry, value in ours.header.items() if entry not in varying} == {
        entry: value for entry, value in reference.header.items() if entry not in varying
    }


def test_two_processes_agree_with_one_to_the_last_bit(tmp_path: Path) -> None:
    multiprocessing.spawn(process, (free_port(), tmp_path), nprocs=PROCESSES)
    reference: dict[str, Evaluation] = {protocol: evaluate(slice(None), protocol, []) for protocol in PROTOCOLS}
    reference["popularity"] = evaluate_popularity(sample(), "test")
    reference["all by the first"] = reference["full"]
    assert reference["full"].header["world_size"] == 1
    for rank in range(PROCESSES):
        outcome = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        assert outcome["full"].header["world_size"] == PROCESSES
        for name, evaluation in reference.items():
            assert_same(outcome[name], evaluation)
        assert "3 of 101 targets were not evaluated (rows [60, 61, 62]" in outcome["missing"]
