"""Counting ranks: what competes, what is an error, and what must not matter."""

import pytest
import torch

from evaluation.ranks import InvalidScoresError, candidate_mask, count_among, count_ranks, top_items

NOTHING_SEEN = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def random_case(users: int = 40, items: int = 200, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Scores on a coarse grid (so that ties abound), a target and three seen items a row."""
    generator = torch.Generator().manual_seed(seed)
    scores_BN = torch.randn(users, items + 1, generator=generator).mul(4).round().div(4)
    target_B = torch.randint(1, items + 1, (users,), generator=generator)
    seen_rows = torch.arange(users).repeat_interleave(3)
    seen_items = torch.randint(1, items + 1, (3 * users,), generator=generator)
    return scores_BN, target_B, seen_rows, seen_items


def test_counts_agree_with_a_loop_over_users_and_items() -> None:
    scores_BN, target_B, seen_rows, seen_items = random_case()
    greater_B, equal_B, candidates_B = count_ranks(scores_BN, target_B, seen_rows, seen_items)
    for row, target in enumerate(target_B.tolist()):
        seen = set(seen_items[seen_rows == row].tolist()) - {target}
        others = [item for item in range(1, scores_BN.shape[1]) if item != target and item not in seen]
        assert greater_B[row] == sum(bool(scores_BN[row, item] > scores_BN[row, target]) for item in others)
        assert equal_B[row] == sum(bool(scores_BN[row, item] == scores_BN[row, target]) for item in others)
        assert candidates_B[row] == len(others) + 1


def test_padding_is_never_ranked_whatever_its_score() -> None:
    scores_BN, target_B, seen_rows, seen_items = random_case()
    expected = count_ranks(scores_BN, target_B, seen_rows, seen_items)
    for padding_score in (torch.inf, torch.nan, -torch.inf, 1e30):
        scores_BN[:, 0] = padding_score
        counts = count_ranks(scores_BN, target_B, seen_rows, seen_items)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(counts, expected, strict=True))


def test_target_competes_although_it_was_seen() -> None:
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    counts = count_ranks(scores, torch.tensor([2]), torch.tensor([0, 0]), torch.tensor([2, 1]))
    assert [int(count) for count in counts] == [0, 0, 2]


def test_repeated_seen_items_are_masked_once() -> None:
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    counts = count_ranks(scores, torch.tensor([3]), torch.tensor([0, 0, 0]), torch.tensor([1, 1, 1]))
    assert [int(count) for count in counts] == [1, 0, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_invalid_scores_raise_and_name_the_rows(bad: float) -> None:
    scores_BN, target_B, *_ = random_case()
    scores_BN[3, 7] = scores_BN[11, 1] = bad
    with pytest.raises(InvalidScoresError, match=r"rows \[3, 11\]") as error:
        count_ranks(scores_BN, target_B, *NOTHING_SEEN)
    assert error.value.rows == [3, 11]


def test_minus_infinity_is_a_score() -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    counts = count_ranks(scores, torch.tensor([2]), *NOTHING_SEEN)
    assert [int(count) for count in counts] == [1, 1, 3]


def test_batch_size_is_irrelevant() -> None:
    scores_BN, target_B, seen_rows, seen_items = random_case()
    whole = torch.stack(count_ranks(scores_BN, target_B, seen_rows, seen_items))
    parts = []
    for start in range(0, len(target_B), 7):
        rows = slice(start, start + 7)
        mine = (seen_rows >= start) & (seen_rows < start + 7)
        counts = count_ranks(scores_BN[rows], target_B[rows], seen_rows[mine] - start, seen_items[mine])
        parts.append(torch.stack(counts))
    assert torch.equal(whole, torch.cat(parts, dim=1))


def test_order_of_items_is_irrelevant() -> None:
    scores_BN, target_B, seen_rows, seen_items = random_case()
    items = scores_BN.shape[1] - 1
    new_id = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(items)])
    permuted_BN = torch.empty_like(scores_BN)
    permuted_BN[:, new_id] = scores_BN
    expected = count_ranks(scores_BN, target_B, seen_rows, seen_items)
    counts = count_ranks(permuted_BN, new_id[target_B], seen_rows, new_id[seen_items])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(counts, expected, strict=True))


def test_order_of_candidates_is_irrelevant_and_only_they_compete() -> None:
    scores_BN, target_B, *_ = random_case()
    negatives_BC = torch.stack([torch.randperm(scores_BN.shape[1] - 1)[:20] + 1 for _ in target_B])
    candidates_BC = torch.cat([negatives_BC, target_B[:, None]], dim=1)
    counts = count_ranks(scores_BN, target_B, *NOTHING_SEEN, candidates_BC)
    shuffled = count_ranks(scores_BN, target_B, *NOTHING_SEEN, candidates_BC[:, torch.randperm(21)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(counts, shuffled, strict=True))
    others_BC = negatives_BC.masked_fill(negatives_BC == target_B[:, None], 0)
    above = scores_BN.gather(1, others_BC) > scores_BN.gather(1, target_B[:, None])
    assert torch.equal(counts.greater, (above & (others_BC > 0)).sum(dim=1))


def test_bfloat16_scores_are_compared_as_float32() -> None:
    scores_BN, target_B, *_ = random_case()
    expected = count_ranks(scores_BN.bfloat16().float(), target_B, *NOTHING_SEEN)
    counts = count_ranks(scores_BN.bfloat16(), target_B, *NOTHING_SEEN)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(counts, expected, strict=True))


def test_top_items_are_a_stable_sort_of_the_allowed_ones() -> None:
    scores_BN, target_B, seen_rows, seen_items = random_case()
    scores_BN[0, 1:] = 0.5
    scores_BN[1, ::2] = -0.0  # equals 0.0, although its bits do not
    scores_BN[1, 1::2] = 0.0
    scores_BN[2, 5] = -torch.inf
    allowed_BN = candidate_mask(scores_BN, target_B, seen_rows, seen_items)
    for row, items in enumerate(top_items(scores_BN, allowed_BN, 30).tolist()):
        allowed = torch.nonzero(allowed_BN[row]).flatten()
        order = torch.sort(scores_BN[row, allowed], descending=True, stable=True).indices
        assert items == allowed[order][:30].tolist()


def test_top_items_are_padded_where_few_are_allowed() -> None:
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    allowed = torch.tensor([[False, True, False, True]])
    assert top_items(scores, allowed, 6).tolist() == [[3, 1, 0, 0, 0, 0]]


def test_top_items_agree_with_the_counts() -> None:
    """The target's place in the list lies in the range that the counts give."""
    scores_BN, target_B, seen_rows, seen_items = random_case()
    allowed_BN = candidate_mask(scores_BN, target_B, seen_rows, seen_items)
    greater_B, equal_B, _ = count_among(scores_BN, target_B, allowed_BN)
    place_B = (top_items(scores_BN, allowed_BN, 200) == target_B[:, None]).int().argmax(dim=1)
    assert bool(((place_B >= greater_B) & (place_B <= greater_B + equal_B)).all())
