"""Windows over long candidate lists: how many, and what they do to the order."""

import pytest
import torch

from models.sliding_windows import best_first, slide, window_spans


@pytest.mark.parametrize(("candidates", "windows"), [(1, 1), (10, 1), (20, 1), (30, 2), (50, 4), (100, 9), (200, 19)])
def test_windows_a_user(candidates: int, windows: int) -> None:
    assert len(window_spans(candidates, 20, 10)) == windows


def test_a_perfect_ranker_finds_the_best_ten_of_each_row_in_one_batched_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    relevance_BN = torch.rand(5, 60, generator=generator)
    calls = []

    def rank(items_BW: torch.Tensor) -> torch.Tensor:
        calls.append(items_BW.shape)
        return best_first(relevance_BN.gather(1, items_BW))

    spans = window_spans(60, 20, 10)
    order = slide(torch.arange(60).expand(5, -1), spans, rank)
    assert calls == [(5, 20)] * 5  # all rows together: as many calls as one user needs
    assert order[:, :10].equal(best_first(relevance_BN)[:, :10])
    assert order.sort(1).values.equal(torch.arange(60).expand(5, -1))


def test_a_stride_that_leaves_candidates_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--method\.stride 21"):
        window_spans(50, 20, 21)
