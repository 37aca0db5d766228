"""Distances, injection, ranks and gamma search against the published BIGRec scripts, in float64."""

from functools import partial

import pytest
import torch
from torch import Tensor

from models.grounding import (
    CF_GAMMAS,
    POPULARITY_GAMMAS,
    collaborative_weight,
    hit_rate_and_ndcg,
    inject,
    min_max,
    popularity_weight,
    ranks_per_gamma,
    search_gamma,
    target_ranks,
    title_distances,
    title_groups,
)

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


@pytest.fixture
def vectors(golden):
    return golden("bigrec_grounding")


def distances(tensors: dict[str, Tensor], phase: str) -> Tensor:
    return title_distances(tensors[f"gen_emb_{phase}"].double(), tensors["item_emb"].double())


def weight(tensors: dict[str, Tensor], kind: str, phase: str) -> Tensor:
    if kind == "pop":
        return popularity_weight(tensors["pop_count"])
    return collaborative_weight(tensors[f"cf_scores_{phase}"][:, :-1].double())  # the last is the padding id


def ranks_of_all(value: Tensor) -> Tensor:
    """Rank of every item, by the same counting as that of a target: [..., U, N]."""
    num_items = value.shape[-1]
    columns = (torch.full(value.shape[-2:-1], item) for item in range(num_items))
    return torch.stack([target_ranks(value, column) for column in columns], dim=-1)


def assert_metrics(ranks: Tensor, expected: dict[str, list[float]], cutoffs: list[int]) -> None:
    hr, ndcg = hit_rate_and_ndcg(ranks, cutoffs)
    close(hr, torch.tensor(expected["HR"], dtype=torch.float64))
    close(ndcg, torch.tensor(expected["NDCG"], dtype=torch.float64))


def test_distances_and_plain_metrics(vectors) -> None:
    meta, tensors = vectors
    distance = distances(tensors, "test")
    close(distance, tensors["dist_test"])
    assert torch.equal(ranks_of_all(distance), tensors["rank_test"])
    assert_metrics(target_ranks(distance, tensors["target_test"]), meta["plain"], meta["K"])
    for phase in ("valid", "test"):
        normalised = min_max(distances(tensors, phase))
        close(normalised, tensors[f"dist_norm_{phase}"])


def test_weights(vectors) -> None:
    _, tensors = vectors
    close(weight(tensors, "pop", "test"), tensors["w_pop"])
    close(weight(tensors, "cf", "test"), tensors["w_cf_test"])


@pytest.mark.parametrize("kind", ["pop", "cf"])
def test_injection_at_fixed_gammas(vectors, kind: str) -> None:
    meta, tensors = vectors
    gammas = meta["fixed_gamma"][kind]["gammas"]
    normalised, bent_by = min_max(distances(tensors, "test")), weight(tensors, kind, "test")
    scores = torch.stack([inject(normalised, bent_by, gamma) for gamma in gammas])
    close(scores, tensors[f"score_{kind}_test"])
    assert torch.equal(ranks_of_all(scores), tensors[f"rank_{kind}_test"])

    gamma_G = torch.tensor(gammas, dtype=torch.float64)
    ranks = ranks_per_gamma(normalised, bent_by, tensors["target_test"], gamma_G)
    for gamma, ranks_of_gamma in zip(gammas, ranks, strict=True):
        assert_metrics(ranks_of_gamma, meta["fixed_gamma"][kind]["metrics"][str(gamma)], meta["K"])


@pytest.mark.parametrize(
    ("kind", "golden_name", "grid"),
    [("cf", "cf", CF_GAMMAS), ("pop", "pop_as_intended", POPULARITY_GAMMAS)],
)
def test_gamma_search(vectors, kind: str, golden_name: str, grid: tuple[float, ...]) -> None:
    meta, tensors = vectors
    expected, cutoffs = meta["gamma_search"][golden_name], meta["K"]
    found = search_gamma(
        min_max(distances(tensors, "valid")),
        weight(tensors, kind, "valid"),
        tensors["target_valid"],
        grid,
        cutoffs,
        without_hits=-1,
    )
    assert found.hr.tolist() == expected["best_gamma_hr"]
    assert found.ndcg.tolist() == expected["best_gamma_ndcg"]
    assert found.valid_hr.tolist() == pytest.approx(expected["valid_best_hr"], abs=1e-12)
    assert found.valid_ndcg.tolist() == pytest.approx(expected["valid_best_ndcg"], abs=1e-12)

    on_test = min_max(distances(tensors, "test")), weight(tensors, kind, "test"), tensors["target_test"]
    hr, _ = hit_rate_and_ndcg(ranks_per_gamma(*on_test, found.hr), cutoffs)
    _, ndcg = hit_rate_and_ndcg(ranks_per_gamma(*on_test, found.ndcg), cutoffs)
    assert hr.diagonal().tolist() == pytest.approx(expected["test"]["HR"], abs=1e-12)
    assert ndcg.diagonal().tolist() == pytest.approx(expected["test"]["NDCG"], abs=1e-12)


def test_popularity_gammas_of_the_published_slip(vectors) -> None:
    """The published script tuned the gamma of HR with NDCG: its HR gammas are our NDCG gammas."""
    meta, tensors = vectors
    expected = meta["gamma_search"]["pop_as_coded"]
    found = search_gamma(
        min_max(distances(tensors, "valid")),
        weight(tensors, "pop", "valid"),
        tensors["target_valid"],
        POPULARITY_GAMMAS,
        meta["K"],
        without_hits=-1,
    )
    assert found.ndcg.tolist() == expected["best_gamma_hr"] == expected["best_gamma_ndcg"]


def test_duplicate_titles_share_the_best_rank(vectors) -> None:
    meta, tensors = vectors
    distance = title_distances(tensors["game_gen_emb"].double(), tensors["game_item_emb"].double())
    close(distance, tensors["game_dist"])
    ranks = target_ranks(distance, tensors["game_target"], title_groups(meta["game"]["titles"]))
    assert torch.equal(ranks, tensors["game_min_rank"])
    assert_metrics(ranks, meta["game"]["result"], meta["K"])
