"""Negatives of other processes: losses and gradients of two processes are those of one with all rows."""

import socket
from datetime import timedelta
from queue import Queue

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.functional import normalize

from models.contrastive import gather_rows, info_nce
from tests.parity.tolerance import assert_near


def two_processes(task, *arguments) -> list[dict[str, Tensor]]:
    """Return what `task(rank, *arguments)` returns on each of two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    outcomes = context.Queue()
    processes = [context.Process(target=_member, args=(outcomes, port, rank, task, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(outcomes.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    return [
        {name: torch.tensor(values, dtype=torch.float64) for name, values in found[rank].items()} for rank in range(2)
    ]


def _member(outcomes: Queue, port: int, rank: int, task, *arguments) -> None:
    store, patience = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=store, world_size=2, rank=rank, timeout=patience)
    outcomes.put((rank, {name: tensor.tolist() for name, tensor in task(rank, *arguments).items()}))
    distributed.barrier()
    distributed.destroy_process_group()


def loss_of_own_rows(rank: int, q: Tensor, k: Tensor, own: tuple[int, int], temperature: float) -> dict[str, Tensor]:
    """One process's summed loss and the gradients of its own rows, before anything is added up over processes."""
    start = sum(own[:rank])
    q, k = (side[start : start + own[rank]].clone().requires_grad_() for side in (q, k))
    candidates, first = gather_rows(normalize(k, dim=1))
    total = info_nce(normalize(q, dim=1) @ candidates.T / temperature, first + torch.arange(len(q)))
    total.backward()
    assert q.grad is not None
    assert k.grad is not None
    return {"total": total.detach(), "q": q.grad, "k": k.grad}


def test_two_ranks_of_contriever(golden) -> None:
    meta, tensors = golden("contriever_loss")
    temperature = meta["inbatch"]["settings"][meta["dist2"]["setting"]]["temperature"]
    half = meta["dist2"]["queries"] // 2
    q, k = tensors["dist2.in.q"], tensors["dist2.in.k"]
    ranks = two_processes(loss_of_own_rows, q, k, (half, half), temperature)
    for rank, loss in zip(ranks, tensors["dist2.out.loss"], strict=True):
        assert float(rank["total"]) / half == pytest.approx(float(loss), rel=1e-5)
    for side in "qk":
        assert_near(torch.cat([rank[side] for rank in ranks]) / half, tensors[f"dist2.grad.{side}"], 1e-5, side)


@pytest.mark.parametrize("own", [(5, 3), (8, 0)])
def test_uneven_shares_add_up_to_one_process(own: tuple[int, int]) -> None:
    """Also where one process only keeps in step, with no rows of its own."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 6).double()
    alone_q, alone_k = q.clone().requires_grad_(), k.clone().requires_grad_()
    alone = info_nce(normalize(alone_q, dim=1) @ normalize(alone_k, dim=1).T / 0.2, torch.arange(8))
    alone.backward()
    ranks = two_processes(loss_of_own_rows, q, k, own, 0.2)
    assert float(sum(rank["total"] for rank in ranks)) == pytest.approx(alone.item(), rel=1e-12)
    for side, gradient in (("q", alone_q.grad), ("k", alone_k.grad)):
        assert gradient is not None
        together = torch.cat([rank[side].reshape(-1, 6) for rank in ranks])
        assert_near(together, gradient, 1e-12, side)
