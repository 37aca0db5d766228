"""How results are measured."""

from dataclasses import dataclass

from .metrics import Ties
from .protocols import Mask, Protocol


@dataclass
class EvaluationConfig:
    """Protocol of the reported figures; the defaults are the only ones that compare with other runs' tables."""

    protocol: Protocol = "full"
    """Rank the whole catalogue, or (to compare with papers) frozen candidate sets: sampled-100, candidates-20."""
    mask: Mask = "full-history"
    """Which items leave the ranking: the user's whole history, only its training part, or none."""
    ties: Ties = "expected"
    """What equal scores count: the expected metric over the tied positions, or the worst or middle position."""
    cutoffs: tuple[int, ...] = (1, 5, 10, 20)
    """K of every metric @K."""
    seed: int = 0
    """Seed of candidate sets and bootstrap intervals."""
