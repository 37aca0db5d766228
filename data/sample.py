"""`sample`: generated, MovieLens-shaped ratings with a planted structure whose best reachable score is known.

Films come in series of six: "Silent River (1984)", "Silent River 2 (1986)", ... A user watches one film after
the other and never one twice. The next film is

- with probability 0.85 a sequel: of each of the last three films the next part that is not watched yet, where
  there is one, weighted 4 : 2 : 1 from the latest film to the third last;
- otherwise, and whenever none of the last three films has an unwatched sequel, a draw among all unwatched
  films by popularity, which falls with a film's rank r = 0, 1, ... as 1 / (r + 20), ranks being random.

Item numbers, series and popularity are independent of each other: the structure shows only in the sequences
and, for models that read, in the titles. `SampleWorld.next_probabilities` is the exact distribution of the
next film, so no model can do better, on average, than to rank by it. On the test targets of the default
sample (500 users, 300 films, 20,065 events, seed 0; leave-one-out, whole catalogue, history masked) that
ranking has HR@10 0.684 and NDCG@10 0.646, where 0.703 and 0.656 are expected; popularity has HR@10 0.102.
"""

from dataclasses import dataclass

import numpy as np

from .interactions import ItemText, RawEvents, encode_ids
from .splits import Phase, Split

PARTS = 6  # films in a series
SEQUEL_PROBABILITY = 0.85
RECENCY_WEIGHTS = (4.0, 2.0, 1.0)  # of the latest, second and third last film
POPULARITY_OFFSET = 20  # the larger, the flatter
HISTORY_LENGTHS = (20, 60)  # events of a user, uniform, both ends included

_ADJECTIVES = (
    "Amber Bitter Broken Burning Crimson Distant Empty Endless Fallen Frozen Gentle Golden Hidden Hollow "
    "Iron Lonely Lost Midnight Painted Quiet Restless Savage Scarlet Silent Velvet Wandering Winter"
)
_NOUNS = (
    "Anchor Bridge Canyon Carnival Castle Compass Desert Engine Forest Garden Harbor Horizon Island Lantern "
    "Letter Mirror Mountain Orchard Palace Planet Promise River Shadow Station Summer Theater Violin"
)
_SERIES_NAMES = [f"{adjective} {noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]
_GENRES = (
    "Action",
    "Adventure",
    "Comedy",
    "Crime",
    "Drama",
    "Fantasy",
    "Horror",
    "Mystery",
    "Romance",
    "Western",
)


@dataclass(frozen=True)
class SampleWorld:
    """The planted structure: titles, the sequel of each film and how popular it is."""

    titles: tuple[str, ...]  # [N + 1]
    categories: tuple[tuple[str, ...], ...]  # [N + 1]
    sequel: np.ndarray  # [N + 1] int64; the next part of the series, 0 after the last
    popularity: np.ndarray  # [N + 1] float64, sums to 1; entry 0 is 0

    def next_probabilities(self, history: np.ndarray) -> np.ndarray:
        """[N + 1] float64: probability of each film to come next after `history`, latest film last."""
        draw = self.popularity.copy()
        draw[history] = 0
        draw /= draw.sum()
        recent = history[::-1][: len(RECENCY_WEIGHTS)]
        sequels = np.zeros_like(draw)
        sequels[self.sequel[recent]] = RECENCY_WEIGHTS[: len(recent)]
        sequels[0] = 0
        sequels[history] = 0
        if not sequels.any():
            return draw
        return SEQUEL_PROBABILITY * sequels / sequels.sum() + (1 - SEQUEL_PROBABILITY) * draw

    def best_scores(self, split: Split, phase: Phase = "test", k: int = 10) -> tuple[float, float]:
        """(HR@k, NDCG@k) of ranking all films but the history by their true probability: the best there is.

        For an unfiltered sample, whose item numbers are those of this world.
        """
        targets = split.targets(phase)
        rank = np.empty(len(targets))
        events = zip(targets.user, targets.position, split.target_items(phase), strict=True)
        for row, (user, position, target) in enumerate(events):
            probabilities = self.next_probabilities(split.history(user, position))
            rank[row] = (probabilities > probabilities[target]).sum()
        hit = rank < k
        return float(hit.mean()), float((hit / np.log2(rank + 2)).mean())


def sample_world(num_series: int = 50, seed: int = 0) -> SampleWorld:
    """The world of one seed. Raises ValueError when there are more series than names for them."""
    if not 1 <= num_series <= len(_SERIES_NAMES):
        raise ValueError(f"--data.sample_series {num_series}: expected 1 to {len(_SERIES_NAMES)}.")
    random = np.random.default_rng([seed, num_series])
    num_items = PARTS * num_series
    item_of = 1 + random.permutation(num_items).reshape(num_series, PARTS)  # [series, part]
    titles = [""] * (num_items + 1)
    categories: list[tuple[str, ...]] = [()] * (num_items + 1)
    for series, name in enumerate(random.choice(_SERIES_NAMES, num_series, replace=False)):
        genres = tuple(sorted(str(genre) for genre in random.choice(_GENRES, 2, replace=False)))
        years = random.integers(1950, 2000) + np.cumsum(random.integers(1, 4, PARTS))
        for part, item in enumerate(item_of[series]):
            titles[item] = f"{name} {part + 1} ({years[part]})" if part else f"{name} ({years[part]})"
            categories[item] = genres
    sequel = np.zeros(num_items + 1, dtype=np.int64)
    sequel[item_of[:, :-1]] = item_of[:, 1:]
    popularity = random.permutation(1 / (np.arange(num_items) + POPULARITY_OFFSET))
    return SampleWorld(tuple(titles), tuple(categories), sequel, np.concatenate([[0.0], popularity / popularity.sum()]))


def read_sample(num_users: int = 500, num_series: int = 50, seed: int = 0) -> RawEvents:
    """Generated events, user by user: about 40 a user, one an hour, sequels rated higher than other films."""
    world = sample_world(num_series, seed)
    random = np.random.default_rng([seed, num_series, num_users])
    num_items = len(world.titles) - 1
    users, items, ratings, timestamps = [], [], [], []
    for user in range(1, num_users + 1):
        length = min(num_items, int(random.integers(*HISTORY_LENGTHS, endpoint=True)))
        first_timestamp = int(random.integers(946_684_800, 978_307_200))  # in the year 2000
        history = np.zeros(0, dtype=np.int64)
        for step in range(length):
            item = int(random.choice(num_items + 1, p=world.next_probabilities(history)))
            is_sequel = item in world.sequel[history[-len(RECENCY_WEIGHTS) :]]
            history = np.append(history, item)
            users.append(str(user))
            items.append(str(item))
            ratings.append(random.integers(4, 6) if is_sequel else random.integers(1, 6))
            timestamps.append(first_timestamp + 3600 * step)
    return RawEvents(
        user=encode_ids(users),
        item=encode_ids(items),
        rating=np.array(ratings, dtype=np.float32),
        timestamp=np.array(timestamps, dtype=np.int64),
        texts={str(i): ItemText(world.titles[i], world.categories[i]) for i in range(1, num_items + 1)},
    )
