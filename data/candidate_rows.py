"""Which items stand in which candidate prompt: the settings, and the candidates of a training example."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .candidate_prompts import Mode, texts_of_domain
from .draws import Draws
from .prompt_rows import PromptSettings, Rows
from .splits import Split
from .title_tokens import ranges


@dataclass(frozen=True)
class CandidateSettings:
    """How prompts with candidates are made. Raises ValueError when the settings contradict each other."""

    domain: str = "movie"
    """Words of the prompt: movie, game and artist as published, book and item."""
    num_candidates: int = 20
    """Items that a training prompt offers, the target among them."""
    mode: Mode = "hybrid"
    """How an item is shown: by its title (text), by its vector (id), or by both (hybrid)."""
    curriculum: Literal["none", "step", "linear"] = "none"
    """Train on text prompts first: step turns to hybrid ones after curriculum_epochs, linear raises their share from 0
    to 1 until then, drawn for each example."""
    curriculum_epochs: float = 1.0
    """Epochs, or parts of one, until all prompts are hybrid."""
    history_length: int = 10
    """History items in a prompt, at most: the last ones."""
    min_history: int = 3
    """Train on positions with at least this many events before them."""
    max_length: int = 1024
    """Tokens in a row, at most; the oldest history items are dropped to fit."""
    titles: Literal["plain", "published-movie"] = "plain"
    """Titles as they are, or without the year and with the article in front, quirks included, as in the papers."""

    def __post_init__(self) -> None:
        texts_of_domain(self.domain)
        if self.num_candidates < 2:
            raise ValueError(f"--method.prompts.num_candidates {self.num_candidates}: expected at least 2.")
        if self.curriculum != "none" and self.mode != "hybrid":
            raise ValueError(
                f"--method.prompts.curriculum {self.curriculum} leads to hybrid prompts: "
                f"expected --method.prompts.mode hybrid, not {self.mode}."
            )
        if self.curriculum_epochs <= 0:
            raise ValueError(f"--method.prompts.curriculum_epochs {self.curriculum_epochs}: expected more than 0.")
        self.history()

    def history(self) -> PromptSettings:
        """What these settings say of histories alone."""
        return PromptSettings(
            history_length=self.history_length, min_history=self.min_history, max_length=self.max_length
        )

    def hybrid_share(self, progress: float) -> float:
        """Share of hybrid prompts after `progress` epochs."""
        if self.curriculum == "none":
            return 1.0
        done = min(progress / self.curriculum_epochs, 1.0)
        return done if self.curriculum == "linear" else float(done == 1.0)


# What the numbers of an example's `Draws` decide; from the last one on they order its candidates, then draw them.
TEXT, HYBRID, ORDER = range(3)


class UnseenCandidates:
    """Draws a training example's candidates: its target, and items that the user had not met by then.

    Raises ValueError when a user has met too much of the catalogue.
    """

    def __init__(
        self, split: Split, rows: Rows, num_candidates: int, flag: str = "--method.prompts.num_candidates"
    ) -> None:
        self.split, self.rows, self.num_candidates = split, rows, num_candidates
        self.targets = split.items[split.offsets[rows.user] + rows.position]
        met = max((len(np.unique(split.training_items(user))) for user in np.unique(rows.user)), default=0)
        if split.num_items - met < num_candidates - 1:
            raise ValueError(
                f"a user has only {split.num_items - met} unseen items, and {num_candidates - 1} are needed: "
                f"lower {flag}"
            )

    def draw(self, indices: np.ndarray, draws: Draws) -> np.ndarray:
        """Distinct items in random order, [B, num_candidates]; a row does not depend on the other rows.

        Each row takes the first numbers of its own endless series that name a new item.
        """
        num_negatives, num_items = self.num_candidates - 1, self.split.num_items
        rows, targets = self.rows.take(indices), self.targets[indices]
        keys = np.arange(len(indices)) * (num_items + 1)
        met = self.split.items[ranges(self.split.offsets[rows.user], rows.position)]
        taken = np.concatenate([np.repeat(keys, rows.position) + met, keys + targets])
        width, usable = num_negatives, np.zeros((len(indices), 1), dtype=bool)
        while (usable.sum(axis=1) < num_negatives).any():
            width *= 2
            items = 1 + draws.integers(ORDER + self.num_candidates, width, num_items)
            drawn = keys[:, None] + items
            usable = ~np.isin(drawn, taken) & _first_of_its_kind(drawn)
        earliest = np.argsort(~usable, axis=1, kind="stable")[:, :num_negatives]
        return shuffled(np.column_stack([targets, np.take_along_axis(items, earliest, axis=1)]), draws)


def _first_of_its_kind(keys: np.ndarray) -> np.ndarray:
    """Where a key has not stood before, in the order of the flattened array: bool, the shape of `keys`."""
    first = np.zeros(keys.size, dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first.reshape(keys.shape)


def shuffled(items_BC: np.ndarray, draws: Draws) -> np.ndarray:
    """The items of each row in random order."""
    order = np.argsort(draws.numbers(ORDER, items_BC.shape[1]), axis=1, kind="stable")
    return np.take_along_axis(items_BC, order, axis=1)
