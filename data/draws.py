"""Random numbers that belong to an example: a function of (seed, epoch, example), whatever batch it is in."""

from typing import NamedTuple

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


class Draws(NamedTuple):
    """An endless row of random numbers for each example; nothing is consumed, so any part may be looked up again."""

    keys: np.ndarray  # [B] uint64

    @classmethod
    def of(cls, seed: int, epoch: int, examples: np.ndarray) -> "Draws":
        keys = np.zeros(len(examples), dtype=np.uint64)
        for value in (seed, epoch, examples):
            keys = _mixed(keys + np.asarray(value).astype(np.uint64) * _STEP)
        return cls(keys)

    def numbers(self, start: int, count: int) -> np.ndarray:
        """Numbers start .. start + count - 1 of each example, [B, count] uint64, uniform."""
        return _mixed(self.keys[:, None] + np.arange(start + 1, start + 1 + count, dtype=np.uint64) * _STEP)

    def fractions(self, start: int, count: int) -> np.ndarray:
        """The same as float64 in [0, 1)."""
        return (self.numbers(start, count) >> np.uint64(11)) * 2.0**-53

    def integers(self, start: int, count: int, high: int) -> np.ndarray:
        """The same as int64 in 0 .. high - 1 (a catalogue is so far below 2^64 that the remainder is uniform)."""
        return (self.numbers(start, count) % np.uint64(high)).astype(np.int64)


def _mixed(state: np.ndarray) -> np.ndarray:
    """One round of SplitMix64 (Steele, Lea and Flood, 2014): neighbouring states give independent numbers."""
    state = state + _STEP
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
