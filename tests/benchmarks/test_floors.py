"""Ratios that no change may lose: quick comparisons, with a wide margin for a machine that has other work."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from benchmarks import e4srec, evaluation, prompts
from data.config import DataConfig
from models import title_generation
from models.title_generation import beam_search_titles
from models.title_trie import TitleTrie
from tests.toys import grouped_llama

pytestmark = pytest.mark.slow


def ratio(slow: Callable[[], object], quick: Callable[[], object], repeats: int = 3) -> float:
    """Return how many times the processor seconds of `quick` the other one takes, after a round to warm up."""
    ratios = [seconds(slow) / seconds(quick) for _ in range(repeats + 1)]
    return median(ratios[1:])


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def test_counting_ranks_stays_well_above_sorting() -> None:
    config = DataConfig(source="sample", sample_users=3000, sample_series=400)
    _, comparisons = evaluation.measure(config, repeats=5)
    ratios = {row["peer"]: row["ratio"]["median"] for row in comparisons if row["ours"] == "counting"}
    assert ratios["sorting"] > 3, f"ranks by counting are {ratios} times as fast as by sorting"


@pytest.mark.usefixtures("data_root")
def test_preparing_prompts_stays_well_above_making_them_in_the_loop(tmp_path: Path) -> None:
    rows, does = prompts.ways([*prompts.FLAGS, "--data.source=ml-100k"], tmp_path)
    found = ratio(lambda: does["loop"](640), lambda: does["prepare"](0)) * rows / 640
    assert found > 5, f"an epoch of prompts made in the loop takes {found:.1f} times as long as preparing them"


def test_a_pass_over_histories_stays_well_above_a_prompt_a_target() -> None:
    sample = ["--data.source=sample", "--data.sample_users=300"]
    contest = e4srec.Contest.of([*e4srec.FLAGS, *sample])
    users = np.arange(64)
    speeds = [contest.train(contest.every_prefix, 16, 16, users[:8]) for _ in range(2)]
    here = [contest.train(contest.every_position, 64, 64, users) for _ in range(2)]
    assert here[1] > 3 * speeds[1], f"targets a second: {here[1]:.0f} here, {speeds[1]:.0f} a prompt a target"


def test_beams_in_a_row_stay_above_a_row_a_beam(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    titles = np.concatenate([random.integers(3, 50, (400, 7)), np.full((400, 1), 2)], axis=1)
    trie = TitleTrie.build(np.arange(0, titles.size + 1, 8), titles.flatten())
    model, ids = grouped_llama(50, 2).float().eval(), torch.randint(3, 50, (16, 300))

    def search() -> None:
        beam_search_titles(model, ids, torch.ones_like(ids), trie, num_beams=20)

    def search_in_rows() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(title_generation, "lacks_free_mask", lambda *_: "it has none")
            search()

    found = ratio(search_in_rows, search)
    assert found > 1.3, f"a row a beam takes {found:.1f} times as long as beams in a row"
