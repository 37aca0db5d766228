"""The rank of each target, by counting: no scores are sorted, and two integers a user leave the device.

`greater` is how many candidates score above the target and `equal` how many others score the same, so the
target may stand at any 0-based position `greater .. greater + equal`. What to make of that range is the tie
rule's business (`metrics.py`). The order of the items never matters.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PADDING_ITEM = 0
_NOT_ALLOWED = torch.iinfo(torch.int64).min


class RankCounts(NamedTuple):
    greater: Tensor  # [B] int64: candidates that score above the target
    equal: Tensor  # [B] int64: other candidates with the target's score
    num_candidates: Tensor  # [B] int64: the target is one of them


@dataclass(frozen=True)
class Ranks:
    """What one evaluation measured, a row a target: every array is [n] int64, ascending by row."""

    row: np.ndarray
    user: np.ndarray
    target: np.ndarray
    greater: np.ndarray
    equal: np.ndarray
    candidates: np.ndarray


class InvalidScoresError(ValueError):
    """Some rows hold NaN or +inf; `rows` are their positions in the batch."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(
            f"NaN or +inf among the scores of batch rows {rows}; scores must be below +inf (-inf is allowed)"
        )
        self.rows = rows


def candidate_mask(
    scores_BN: Tensor,
    target_B: Tensor,
    seen_rows: Tensor,
    seen_items: Tensor,
    candidates_BC: Tensor | None = None,
) -> Tensor:
    """Which items compete in each row: [B, N + 1] bool.

    All items (or those of `candidates_BC` [B, C], in any order) without padding and without the pairs
    (`seen_rows`, `seen_items`), both [S] int64. The target always competes, also when it was seen before.
    """
    if candidates_BC is None:
        allowed_BN = torch.ones_like(scores_BN, dtype=torch.bool)
    else:
        allowed_BN = torch.zeros_like(scores_BN, dtype=torch.bool).scatter_(1, candidates_BC, True)
    allowed_BN[:, PADDING_ITEM] = False
    allowed_BN[seen_rows, seen_items] = False
    return allowed_BN.scatter_(1, target_B[:, None], True)


def count_ranks(
    scores_BN: Tensor,
    target_B: Tensor,
    seen_rows: Tensor,
    seen_items: Tensor,
    candidates_BC: Tensor | None = None,
) -> RankCounts:
    """Rank each row's target among its candidates (see `candidate_mask`), in float32.

    `scores_BN` is [B, N + 1]; column 0 is padding and is never looked at. Raises InvalidScoresError, which
    names the rows, when a score is NaN or +inf.
    """
    allowed_BN = candidate_mask(scores_BN, target_B, seen_rows, seen_items, candidates_BC)
    return count_among(scores_BN, target_B, allowed_BN)


def count_among(scores_BN: Tensor, target_B: Tensor, allowed_BN: Tensor) -> RankCounts:
    """`count_ranks` for a mask that is already built."""
    scores_BN = scores_BN.float()
    valid_B = scores_BN[:, PADDING_ITEM + 1 :].amax(dim=1) < torch.inf  # the largest is NaN where any is: false
    if not valid_B.all():
        raise InvalidScoresError(torch.nonzero(~valid_B).flatten().tolist())
    target_score_B1 = scores_BN.gather(1, target_B[:, None])
    greater_B = _count((scores_BN > target_score_B1) & allowed_BN)
    equal_B = _count((scores_BN == target_score_B1) & allowed_BN) - 1  # the target equals itself
    return RankCounts(greater_B, equal_B, _count(allowed_BN))


def _count(mask_BN: Tensor) -> Tensor:
    """True entries of each row, int64; summed as bytes into 32 bits, which takes half as long as a sum of bool."""
    return mask_BN.view(torch.int8).sum(dim=1, dtype=torch.int32).long()


def top_items(scores_BN: Tensor, allowed_BN: Tensor, k: int) -> Tensor:
    """The k best allowed items of each row, best first: [B, k] int64, 0 where a row has fewer.

    Equal scores go by smaller item id, so the lists are the same on every device and in every batch; `topk`
    alone breaks ties as its kernel likes. Score and id therefore share one integer key.
    """
    bits_BN = (scores_BN.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 the same bits
    ascending_BN = torch.where(bits_BN < 0, bits_BN ^ 0x7FFFFFFF, bits_BN)  # integers in the order of the floats
    width = scores_BN.shape[1]
    smaller_id_first = torch.arange(width, 0, -1, device=scores_BN.device)
    key_BN = (ascending_BN.long() << 32).add_(smaller_id_first).masked_fill_(~allowed_BN, _NOT_ALLOWED)
    best_BK, items_BK = key_BN.topk(min(k, width), dim=1)
    items_BK = items_BK.masked_fill(best_BK == _NOT_ALLOWED, PADDING_ITEM)
    return torch.nn.functional.pad(items_BK, (0, k - items_BK.shape[1]), value=PADDING_ITEM)
