"""Random numbers for order, crops and flips, as functions of (seed, epoch, index).

A resumed run need not replay any of them. The counter-based generator is SplitMix64 (Steele, Lea,
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the n-th number of stream
`key` is mix(key + n * GOLDEN). It is the same on every platform and NumPy version.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble the bits of uint64 of any shape with SplitMix64's finalizer, a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_keys(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """Return each sample's stream key, uint64 (N,), from seed, epoch and sample indices (N,)."""
    base = np.array([seed % (1 << 64)], dtype=np.uint64)
    base = mix(mix(base + GOLDEN) + np.array([epoch], dtype=np.uint64) * GOLDEN)
    return mix(base + (indices.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def uniform(keys: np.ndarray, counter: np.ndarray | int) -> np.ndarray:
    """Return the counter-th number of each stream, float64 in [0, 1); both broadcast."""
    counter = np.atleast_1d(np.asarray(counter, dtype=np.uint64)) + np.uint64(1)
    # The upper 53 bits, which a float64 holds exactly.
    return (mix(keys + counter * GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return a permutation of 0..count-1, int64, for (seed, epoch).

    The samples are sorted by a hash of their index.
    """
    # The constant ("order" in ASCII) keeps these numbers apart from those of the crops.
    return np.argsort(sample_keys(seed ^ 0x6F72646572, epoch, np.arange(count)), kind="stable")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that timm draws from, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
