"""Grounding beyond the published numbers: ties, chunks, beams, catalogue scores and text matches."""

import pytest
import torch

from models import grounding
from models.grounding import (
    POPULARITY_GAMMAS,
    catalog_scores,
    combine_beams,
    inject,
    match_titles,
    min_max,
    ranks_per_gamma,
    search_gamma,
    target_ranks,
    title_distances,
    title_groups,
)


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distances in 0..1 [6, 40], weights [6, 40] and targets [6]."""
    random = torch.Generator().manual_seed(3)
    distance = min_max(torch.rand(6, 40, generator=random, dtype=torch.float64))
    weight = torch.rand(6, 40, generator=random, dtype=torch.float64)
    return distance, weight, torch.randint(40, (6,), generator=random)


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5, 99.0])
def test_nearest_item_stays_first(case, gamma: float) -> None:
    distance, weight, _ = case
    nearest = distance.argmin(dim=1)
    assert target_ranks(inject(distance, weight, gamma), nearest).tolist() == [0] * len(distance)


def test_counted_ranks_are_those_of_a_double_argsort(case) -> None:
    distance, weight, target = case
    bent = inject(distance, weight, 3.0)
    by_sorting = bent.argsort(dim=1).argsort(dim=1)
    assert target_ranks(bent, target).tolist() == by_sorting.gather(1, target[:, None]).flatten().tolist()


def test_chunks_do_not_change_ranks(case, monkeypatch) -> None:
    distance, weight, target = case
    gammas = torch.tensor(POPULARITY_GAMMAS, dtype=torch.float64)
    groups = torch.arange(40) // 2 * 2
    whole = ranks_per_gamma(distance, weight, target, gammas, groups)
    assert whole.shape == (100, 6)
    assert len(whole.unique(dim=0)) > 10
    for elements in (1, 100, 40 * 6 * 7):
        monkeypatch.setattr(grounding, "CHUNK_ELEMENTS", elements)
        assert torch.equal(ranks_per_gamma(distance, weight, target, gammas, groups), whole)


def test_shared_gamma_is_best_for_mean_ndcg_and_smallest_of_equals() -> None:
    distance = torch.tensor([[0.0, 0.2, 0.5, 1.0]], dtype=torch.float64)
    weight = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    # Item 2 passes item 1 when 2^-gamma * 0.5 < 0.2: from gamma 2 on, whatever else is tried.
    found = search_gamma(distance, weight, torch.tensor([2]), range(10), [1, 2, 3])
    assert found.shared.item() == 2
    assert found.hr.tolist() == [0.0, 2.0, 0.0]  # never first; second from gamma 2; third already at 0
    assert found.valid_hr.tolist() == [0.0, 1.0, 1.0]
    assert search_gamma(distance, weight, torch.tensor([3]), [1.0, 2.0], [1], without_hits=-1).hr.tolist() == [-1]


def test_constant_rows_scale_to_zero() -> None:
    assert min_max(torch.full((2, 3), 7.0)).tolist() == [[0.0] * 3] * 2


def test_cosine_ignores_length_and_l2_does_not() -> None:
    titles = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    text = torch.tensor([[2.0, 2.0]])
    assert title_distances(text, titles, "cosine")[0].tolist() == pytest.approx([1 - 0.5**0.5, 0.0], abs=1e-6)
    assert title_distances(text, titles)[0].tolist() == pytest.approx([5**0.5, 2**0.5])


def test_small_distances_survive_large_vectors() -> None:
    base = torch.full((1, 64), 1000.0)
    titles = torch.cat([base + step * 1e-2 for step in (3, 1, 2)])
    assert title_distances(base, titles).argsort().tolist() == [[1, 2, 0]]


def test_beams_by_minimum_and_soft_minimum() -> None:
    distance = torch.tensor([[[0.1, 0.9], [0.8, 0.9]]], dtype=torch.float64)  # one user, two beams, two items
    assert combine_beams(distance).tolist() == [[0.1, 0.9]]
    soft = combine_beams(distance, temperature=0.1)
    assert soft[0, 1].item() == pytest.approx(0.9)  # beams that agree keep their distance
    assert 0.1 < soft[0, 0].item() < 0.45
    assert combine_beams(distance, temperature=1e-4)[0, 0].item() == pytest.approx(0.1, abs=1e-3)


def test_catalog_scores_put_padding_last() -> None:
    scores = catalog_scores(torch.tensor([[0.5, 0.0]], dtype=torch.float64))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[float("-inf"), -0.5, 0.0]]
    assert scores.argmax(dim=1).tolist() == [2]


def test_groups_of_equal_titles() -> None:
    groups = title_groups(["a", "b", "a", "c", "b"])
    assert groups.tolist() == [0, 1, 0, 3, 1]
    value = torch.tensor([[0.9, 0.3, 0.1, 0.2, 0.5]])
    for target, alone, with_groups in [(0, 4, 0), (2, 0, 0), (3, 1, 1), (4, 3, 2)]:
        assert target_ranks(value, torch.tensor([target])).tolist() == [alone]
        assert target_ranks(value, torch.tensor([target]), groups).tolist() == [with_groups]


TITLES = ["Heat (1995)", "Fargo (1996)", "Fargo (1996)", "Return, The", "Return of the King, The", '"Quoted"']


@pytest.mark.parametrize(
    ("text", "exact", "by_substring"),
    [
        ('"heat  (1995)" ', [0], [0]),  # case, quotes and blanks do not count
        ("Fargo (1996)", [1, 2], [1, 2]),  # all that share the title
        ("Heat", [], [0]),
        ("Return", [], []),  # two titles contain it
        ("Return, The", [3], [3]),
        ("quoted", [5], [5]),
        ("(19", [], []),  # too short
        ("Heat (1995) and more", [], []),
        ("", [], []),
    ],
)
def test_matches(text: str, exact: list[int], by_substring: list[int]) -> None:
    assert match_titles([text], TITLES)[0].nonzero().flatten().tolist() == exact
    assert match_titles([text], TITLES, substring=True)[0].nonzero().flatten().tolist() == by_substring
