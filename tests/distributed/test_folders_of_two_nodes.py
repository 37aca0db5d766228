"""Hosts that share their folders, and hosts that share none."""

from pathlib import Path

import pytest

from benchmarks.processes import ROOT, start_ranks
from tests.hosts import Host, Job, start_node
from tests.runs import SMALL, losses, results

# The rate is too high to end with the best weights; batches are small, so that both processes evaluate some.
BEST_IS_NOT_LAST = [
    *(*SMALL, "--method.dropout=0", "--train.lr=2", "--train.epochs=6"),
    *("--train.eval_batch_size=8", "--train.save_every_steps=100"),
]
PROMPTS = (
    "--model bigrec --data.source sample --data.sample_users 40 --data.sample_series 8 --backbone.tiny.hidden_size 32 "
    "--backbone.tiny.layers 1 --train.max_steps 2 --train.batch_size 8 --train.precision fp32 --train.trackers []"
).split()
DDP = ROOT / "launch/accelerate/ddp.yaml"

pytestmark = pytest.mark.slow


def start_both(hosts: tuple[Host, Host], folder: Path, arguments: list[str], outputs: list[Path]) -> list[Job]:
    return [
        start_node(host, rank, *arguments, output=outputs[rank], log=folder / f"node-{rank}.log", config=DDP)
        for rank, host in enumerate(hosts)
    ]


def test_hosts_that_share_no_run_folder_evaluate_the_same_weights(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Only the first one writes, and only it can read the best checkpoint; a later start cannot go on, and says why."""
    one_host = start_ranks(*BEST_IS_NOT_LAST, output=tmp_path / "one")
    assert [rank.wait() for rank in one_host] == [0, 0], one_host[0].text() + one_host[1].text()
    expected = results(tmp_path / "one")
    assert expected["training"]["best_step"] < expected["training"]["steps"]

    folders = [tmp_path / "run-0", tmp_path / "run-1"]
    nodes = start_both(hosts, tmp_path, BEST_IS_NOT_LAST, folders)
    assert [node.wait() for node in nodes] == [0, 0], nodes[0].text() + nodes[1].text()
    assert not folders[1].exists(), "one process writes"
    assert losses(folders[0]) == losses(tmp_path / "one")
    assert results(folders[0]) == expected

    nodes = start_both(hosts, tmp_path, [*BEST_IS_NOT_LAST, "--train.epochs=7"], folders)
    assert all(node.wait() for node in nodes)
    assert "must be on a file system that all processes share" in nodes[0].text() + nodes[1].text()


def test_prompts_are_built_once_a_cache(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Once for both hosts where the cache is shared, once on each where it is not."""
    built: list[set[Path]] = []
    for caches in (["shared", "shared"], ["own-0", "own-1"]):
        nodes = [
            start_node(
                *(host, rank, *PROMPTS, f"--data.cache={tmp_path / caches[rank]}"),
                output=tmp_path / f"run-{caches[0]}",
                log=tmp_path / f"{caches[rank]}-{rank}.log",
                config=DDP,
            )
            for rank, host in enumerate(hosts)
        ]
        assert [node.wait() for node in nodes] == [0, 0], nodes[0].text() + nodes[1].text()
        for cache in sorted(set(caches)):
            built.append({file.relative_to(tmp_path / cache) for file in (tmp_path / cache).rglob("prompts.arrow")})
    assert built[0], "there are prompts"
    assert built[0] == built[1] == built[2]
    assert losses(tmp_path / "run-own-0") == losses(tmp_path / "run-shared")
