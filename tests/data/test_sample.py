import numpy as np
import pytest

from data.config import DataConfig
from data.sample import PARTS, SEQUEL_PROBABILITY, read_sample, sample_world
from data.sources import read
from data.splits import split


@pytest.fixture(scope="module")
def default_sample():
    config = DataConfig(source="sample")
    interactions = read(config)
    return interactions, split(interactions, config), sample_world()


def popularity_hit_rate(made, k: int = 10) -> float:
    hits = []
    for user, position, target in zip(made.test.user, made.test.position, made.target_items("test"), strict=True):
        counts = made.item_counts()
        counts[0] = -1
        counts[made.history(user, position)] = -1
        hits.append((counts > counts[target]).sum() < k)
    return float(np.mean(hits))


def test_shape_of_the_default(default_sample):
    interactions, made, world = default_sample
    assert made.num_users == len(made.test) == 500
    assert made.num_items == 300
    assert len(interactions.item) == 20_065
    assert interactions.catalog.titles == world.titles
    assert interactions.catalog.categories == world.categories
    assert len(set(world.titles)) == 301
    assert set(np.unique(interactions.rating)) == {1, 2, 3, 4, 5}
    for user in range(made.num_users):  # never one film twice
        sequence = made.items[made.offsets[user] : made.offsets[user + 1]]
        assert len(set(sequence.tolist())) == len(sequence)


def test_titles_tell_the_sequel(default_sample):
    *_, world = default_sample
    for item in np.flatnonzero(world.sequel):
        part, sequel = (world.titles[i].rsplit(" (", 1) for i in (item, world.sequel[item]))
        words = part[0].split()
        number = int(words[2]) if len(words) == 3 else 1
        assert sequel[0] == f"{words[0]} {words[1]} {number + 1}"
        assert sequel[1] > part[1]  # the year
    assert (world.sequel == 0).sum() == 1 + 300 // PARTS


def test_best_reachable_scores_are_the_documented_ones(default_sample):
    """The numbers of the docstring, to their last digit: changing the generator must change them there."""
    _, made, world = default_sample
    hit_rate, ndcg = world.best_scores(made)
    assert (round(hit_rate, 3), round(ndcg, 3)) == (0.684, 0.646)
    tops = []
    for user, position in zip(made.test.user, made.test.position, strict=True):
        tops.append(np.sort(world.next_probabilities(made.history(user, position)))[::-1][:10])
    top = np.array(tops)
    assert top.sum(axis=1).mean().round(3) == 0.703
    assert (top / np.log2(np.arange(10) + 2)).sum(axis=1).mean().round(3) == 0.656
    assert round(popularity_hit_rate(made), 3) == 0.102


def test_probabilities_of_known_histories():
    world = sample_world(num_series=3, seed=4)
    first = int(np.flatnonzero(world.sequel)[0])
    assert np.allclose(world.next_probabilities(np.zeros(0, dtype=np.int64)), world.popularity)

    after_one = world.next_probabilities(np.array([first]))
    sequel = world.sequel[first]
    drawn = world.popularity[sequel] / (1 - world.popularity[first])
    assert after_one.sum() == pytest.approx(1)
    assert after_one[0] == after_one[first] == 0
    assert after_one[sequel] == pytest.approx(SEQUEL_PROBABILITY + (1 - SEQUEL_PROBABILITY) * drawn)

    a, b = (int(item) for item in np.flatnonzero(world.sequel)[:2])
    if world.sequel[a] not in (a, b) and world.sequel[b] not in (a, b):
        after_two = world.next_probabilities(np.array([a, b])) - 0.15 * _draw(world, [a, b])
        assert after_two[world.sequel[b]] == pytest.approx(0.85 * 2 / 3)
        assert after_two[world.sequel[a]] == pytest.approx(0.85 * 1 / 3)

    last_part = int(np.flatnonzero(world.sequel[1:] == 0)[0]) + 1
    assert np.allclose(world.next_probabilities(np.array([last_part])), _draw(world, [last_part]))


def _draw(world, history):
    draw = world.popularity.copy()
    draw[history] = 0
    return draw / draw.sum()


def test_events_follow_the_probabilities(default_sample):
    """Calibration: over all events, the mean probability of the sequels equals how often one was watched."""
    _, made, world = default_sample
    expected, watched = [], []
    for user in range(0, made.num_users, 5):
        sequence = made.items[made.offsets[user] : made.offsets[user + 1]]
        for position in range(1, len(sequence)):
            history = sequence[:position]
            sequels = np.setdiff1d(world.sequel[history[-3:]], np.append(history, 0))
            expected.append(world.next_probabilities(history)[sequels].sum())
            watched.append(sequence[position] in sequels)
    assert len(watched) > 3000
    assert np.mean(watched) == pytest.approx(np.mean(expected), abs=0.02)
    assert 0.5 < np.mean(watched) < SEQUEL_PROBABILITY


def test_same_seed_same_sample():
    one, again, other = (read_sample(num_users=5, num_series=4, seed=seed) for seed in (1, 1, 2))
    assert one.item.equals(again.item)
    assert np.array_equal(one.timestamp, again.timestamp)
    assert one.texts == again.texts
    assert not one.item.equals(other.item)


def test_a_sample_smaller_than_a_history():
    interactions = read(DataConfig(source="sample", sample_users=3, sample_series=1))
    assert np.bincount(interactions.user).tolist() == [6, 6, 6]


def test_too_many_series():
    with pytest.raises(ValueError, match=r"--data\.sample_series 1000"):
        read(DataConfig(source="sample", sample_series=1000))
