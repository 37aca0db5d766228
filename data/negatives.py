"""Negative items for sampled losses, drawn so that no process count or resume changes them."""

import numpy as np

from .splits import Split


class UniformNegatives:
    """Draws items uniformly, without replacement, among those that the user has not met in training.

    The draw is a function of (seed, epoch, example), so one process and many see the same negatives.
    """

    def __init__(self, split: Split, count: int, seed: int) -> None:
        unseen = split.num_items - max(len(np.unique(split.training_items(user))) for user in range(split.num_users))
        if count > unseen:
            raise ValueError(
                f"{count} negatives were asked for, but a user has only {unseen} unseen items: "
                "lower --method.num_negatives"
            )
        self.split, self.count, self.seed = split, count, seed

    def draw(self, users: np.ndarray, examples: np.ndarray, epoch: int) -> np.ndarray:
        """Return [B, count] int64 item ids for the given users; `examples` are the indices that seed the draw."""
        drawn = np.empty((len(users), self.count), dtype=np.int64)
        for i, (user, example) in enumerate(zip(users, examples, strict=True)):
            random = np.random.default_rng((self.seed, epoch, int(example)))
            free = np.ones(self.split.num_items + 1, dtype=bool)
            free[0] = False
            free[self.split.training_items(int(user))] = False
            drawn[i] = random.choice(np.flatnonzero(free), self.count, replace=False, shuffle=False)
        return drawn

    def draw_each(self, users: np.ndarray, examples: np.ndarray, counts: np.ndarray, epoch: int) -> np.ndarray:
        """Return [sum of counts] int64 item ids: one for each label of an example, drawn with replacement."""
        drawn = []
        for user, example, count in zip(users, examples, counts, strict=True):
            random = np.random.default_rng((self.seed, epoch, int(example), 1))  # another draw than `draw`
            free = np.ones(self.split.num_items + 1, dtype=bool)
            free[0] = False
            free[self.split.training_items(int(user))] = False
            drawn.append(random.choice(np.flatnonzero(free), count))
        return np.concatenate(drawn)


class SharedNegatives:
    """Draws the same negatives for all labels of a batch, with replacement, by how often items occur in training.

    An item's probability is proportional to its count to the power of `alpha`: 0 is uniform, 1 popularity. Cold items
    are not there yet, so they are never drawn. How often an item is expected comes with the draw, so that a sampled
    softmax can be corrected for it (logQ).
    """

    def __init__(self, split: Split, count: int, alpha: float, seed: int) -> None:
        self.count, self.seed = count, seed
        weights = np.maximum(split.item_counts()[1:], 1).astype(np.float64) ** alpha
        weights[split.cold_items - 1] = 0
        self.probability = weights / weights.sum()
        self.cumulative = np.cumsum(self.probability)
        self.cumulative /= self.cumulative[-1]  # ends with 1 exactly, already at the last item that may be drawn

    def draw(self, example: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return items [K] int64 and log(K q) [K] float32, a function of (seed, epoch, example)."""
        random = np.random.default_rng((self.seed, epoch, example))
        drawn = np.searchsorted(self.cumulative, random.random(self.count), "right")
        return drawn + 1, np.log(self.count * self.probability[drawn]).astype(np.float32)
