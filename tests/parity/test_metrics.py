"""Ranks and metrics against published libraries (ranx, trec_eval, RecBole) on the golden score matrices."""

import numpy as np
import pytest
import torch

from evaluation.metrics import Ties, multi_relevant_metrics, per_user_metrics
from evaluation.ranks import candidate_mask, count_among, count_ranks, top_items

TOLERANCE = 1e-9  # what the libraries agree to among themselves


@pytest.fixture
def vectors(golden):
    return golden("metrics")


def seen_pairs(mask_UN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, items = torch.nonzero(mask_UN, as_tuple=True)
    return rows, items


def assert_block(block: str, metrics: dict[str, np.ndarray], meta: dict, tensors: dict) -> None:
    expected = dict(zip(meta[block]["metric_names"], tensors[f"{block}.per_user"].numpy(), strict=True))
    expected |= {
        name.removeprefix(f"{block}."): values.numpy()
        for name, values in tensors.items()
        if name.startswith(f"{block}.MAP_recbole@") and "MAP_recbole@1" in metrics
    }
    assert len(expected) >= 3 * len(meta["K"])
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, rtol=0, atol=TOLERANCE, err_msg=f"{block} {name}")
        assert metrics[name].mean() == pytest.approx(meta[block]["mean"][name], abs=TOLERANCE)


@pytest.mark.parametrize(("block", "masked"), [("full_single", True), ("full_single_unmasked", False)])
def test_one_target(vectors, block: str, masked: bool) -> None:
    meta, tensors = vectors
    mask_UN = tensors["history_mask"] if masked else torch.zeros_like(tensors["history_mask"])
    greater, equal, candidates = count_ranks(tensors["scores"], tensors["target"], *seen_pairs(mask_UN))
    assert_block(block, per_user_metrics(greater.numpy(), equal.numpy(), meta["K"]), meta, tensors)
    assert torch.equal(candidates, (~mask_UN[:, 1:]).sum(dim=1))


@pytest.mark.parametrize(("block", "masked"), [("full_single", True), ("full_single_unmasked", False)])
def test_one_target_in_ranked_lists(vectors, block: str, masked: bool) -> None:
    """The same from the recommended items, which also proves that `top_items` ranks as the libraries do."""
    meta, tensors = vectors
    mask_UN = tensors["history_mask"] if masked else torch.zeros_like(tensors["history_mask"])
    allowed_UN = candidate_mask(tensors["scores"], tensors["target"], *seen_pairs(mask_UN))
    ranked_UK = top_items(tensors["scores"], allowed_UN, max(meta["K"]))
    relevant_UK = (ranked_UK == tensors["target"][:, None]).numpy()
    metrics = multi_relevant_metrics(relevant_UK, np.ones(len(relevant_UK), dtype=np.int64), meta["K"])
    assert_block(block, metrics, meta, tensors)


def test_several_relevant_items(vectors) -> None:
    meta, tensors = vectors
    scores_UN, relevant_UN = tensors["multi_scores"], tensors["multi_relevant"]
    allowed_UN = ~tensors["history_mask"]
    allowed_UN[:, meta["padding_id"]] = False
    ranked_UK = top_items(scores_UN, allowed_UN, max(meta["K"]))
    relevant_UK = relevant_UN.gather(1, ranked_UK) & (ranked_UK != meta["padding_id"])
    metrics = multi_relevant_metrics(relevant_UK.numpy(), relevant_UN.sum(dim=1).numpy(), meta["K"])
    assert_block("full_multi", metrics, meta, tensors)


@pytest.mark.parametrize("ties", ["expected", "pessimistic", "mid-rank", "optimistic"])
def test_tie_rules(vectors, ties: Ties) -> None:
    meta, tensors = vectors
    seen = seen_pairs(tensors["history_mask"])
    greater, equal, candidates = count_ranks(tensors["tie_scores"], tensors["target"], *seen)
    assert torch.equal(greater, tensors["tie_n_greater"])
    assert torch.equal(equal, tensors["tie_n_equal_others"])
    assert bool((equal + 1 == candidates).any()), "the block promises a constant scorer"
    metrics = per_user_metrics(greater.numpy(), equal.numpy(), meta["K"], ties)
    assert_block(f"ties_{ties.replace('-', '_')}", metrics, meta, tensors)


def test_lower_id_first_is_the_order_of_the_ranked_lists(vectors) -> None:
    meta, tensors = vectors
    seen = seen_pairs(tensors["history_mask"])
    allowed_UN = candidate_mask(tensors["tie_scores"], tensors["target"], *seen)
    greater, equal, _ = count_among(tensors["tie_scores"], tensors["target"], allowed_UN)
    ranked_UN = top_items(tensors["tie_scores"], allowed_UN, meta["sizes"]["items"])
    place_U = (ranked_UN == tensors["target"][:, None]).int().argmax(dim=1)
    assert bool(((place_U >= greater) & (place_U <= greater + equal)).all())
    metrics = per_user_metrics(place_U.numpy(), np.zeros(len(place_U), dtype=np.int64), meta["K"])
    assert_block("ties_lower_id_first", metrics, meta, tensors)


def test_sampled_candidates(vectors) -> None:
    meta, tensors = vectors
    users = tensors["sampled_users"]
    scores_SN, target_S = tensors["scores"][users], tensors["target"][users]
    candidates_SC = torch.cat([tensors["sampled_negatives"], target_S[:, None]], dim=1)
    nothing = torch.empty(0, dtype=torch.int64)
    greater, equal, num_candidates = count_ranks(scores_SN, target_S, nothing, nothing, candidates_SC)
    assert bool((num_candidates == candidates_SC.shape[1]).all())
    metrics = per_user_metrics(greater.numpy(), equal.numpy(), meta["K"])
    assert_block("sampled_100", metrics, meta, tensors)
