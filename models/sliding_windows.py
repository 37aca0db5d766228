"""Long candidate lists, sorted by a ranker of short ones: windows that slide from the back to the front.

Source: Sun et al., "Is ChatGPT Good at Search?", arXiv 2304.09542; windows as in castorini/rank_llm 1b3cabb.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The items of one window, [B, W], best guess first -> places in the window, best first, [B, W].
RankWindow = Callable[[Tensor], Tensor]


def window_spans(num_candidates: int, window: int, stride: int, first: int = 0, last: int | None = None) -> list[range]:
    """The places of each window, in the order in which they are ranked; they cover first..last-1.

    A list that fits is one window; else windows end at `last` and move `stride` to the front. Raises ValueError where
    the stride leaves candidates out.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"--method.stride {stride}: expected 1 to --method.window {window}")
    end = num_candidates if last is None else min(last, num_candidates)
    start = max(end - window, first)
    spans = []
    while end > start:
        spans.append(range(start, end))
        if start == first:
            break
        end, start = end - stride, max(start - stride, first)
    return spans


def slide(candidates_BK: Tensor, spans: list[range], rank_window: RankWindow) -> Tensor:
    """The candidates in their new order, [B, K]; each step ranks the same window of all rows at once.

    Scores belong to places, not to candidates: only the order changes.
    """
    order_BK = candidates_BK.clone()
    for span in spans:
        window = slice(span.start, span.stop)
        items_BW = order_BK[:, window]
        order_BK[:, window] = torch.gather(items_BW, 1, rank_window(items_BW))
    return order_BK


def best_first(scores_BK: Tensor) -> Tensor:
    """Places by falling score, [B, K]; equal scores keep their order."""
    return scores_BK.argsort(dim=1, descending=True, stable=True)
