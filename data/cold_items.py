"""Items that nobody has met before the test: what a recommender makes of a new item is measured on them."""

import hashlib
from dataclasses import replace

import numpy as np

from .interactions import Catalog
from .splits import Split, Targets


def with_cold_items(split: Split, catalog: Catalog, share: float, seed: int) -> Split:
    """Hold a share of the test's items out of everything else: they are left as test targets alone.

    They are drawn from the items that some test target asks for. Their other events leave all histories, a validation
    target among them is asked no more, and neither is a target that has no history left. The hash names the items, too.
    Raises ValueError for a share that leaves no item on one side.
    """
    asked = np.unique(split.target_items("test"))
    count = round(share * len(asked))
    if not 0 < count < len(asked):
        raise ValueError(
            f"--data.cold_items {share}: of the {len(asked):,} items that the test asks for, it holds {count:,} out; "
            "expected at least one, and not all"
        )
    cold = np.sort(np.random.default_rng(seed).choice(asked, count, replace=False))
    is_cold = np.zeros(split.num_items + 1, dtype=bool)
    is_cold[cold] = True
    is_test_event = np.zeros(len(split.items), dtype=bool)
    is_test_event[split.offsets[split.test.user] + split.test.position] = True
    kept = ~is_cold[split.items] | is_test_event

    kept_before = np.concatenate([[0], np.cumsum(kept)])  # of the first e events, how many stay
    starts = split.offsets[:-1]

    def moved(targets: Targets) -> Targets:
        events = split.offsets[targets.user] + targets.position
        position = kept_before[events] - kept_before[split.offsets[targets.user]]
        asked = kept[events] & (position > 0)
        return Targets(targets.user[asked], position[asked])

    digest = hashlib.sha256(split.hash.encode())
    for item in cold:
        digest.update(f"\n{catalog.raw_ids[item]}".encode())
    return replace(
        split,
        offsets=kept_before[split.offsets],
        items=split.items[kept],
        ratings=split.ratings[kept] if len(split.ratings) else split.ratings,
        train_end=kept_before[starts + split.train_end] - kept_before[starts],
        valid=moved(split.valid),
        test=moved(split.test),
        hash=digest.hexdigest(),
        cold_items=cold,
    )
