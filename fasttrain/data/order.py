"""The order of samples: keyed bijections with random access, one number at a time and in arrays, bit for bit alike.

Nothing here is a table: the place of sample 10**12 costs what that of sample 0 does.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 4  # of the Feistel network
FEW = 32
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(x: int) -> int:
    """One step of splitmix64: a bijection of 64 bits whose every output bit depends on every input bit."""
    x = (x + _GOLDEN) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * _FIRST & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * _SECOND & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def mix_each(x: np.ndarray) -> np.ndarray:
    """`mix` of every element of a uint64 array."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))


def permuted(i: int, n: int, key: int) -> int:
    """Where i goes under the bijection of 0 .. n-1 that `key` names.

    A Feistel network over the smallest even number of bits that holds n is a bijection of a power of four; walking on
    until the value is below n makes it one of 0 .. n-1 (Black and Rogaway, Ciphers with arbitrary finite domains,
    2002). Fewer than four walks are expected.
    """
    half = _half(n)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(key + turn ^ right << 8) & mask)
        i = left << half | right
        if i < n:
            return i


def permuted_each(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """`permuted` of every element, each under its own key.

    Args:
        places: int64, shape (m,), each in 0 .. n-1.
        n: below 2**62.
        keys: uint64, shape (m,).

    Returns:
        int64, shape (m,).

    Example:
        >>> keys = np.full(5, 7, np.uint64)
        >>> permuted_each(np.arange(5), 5, keys).tolist() == [permuted(i, 5, key=7) for i in range(5)]
        True
    """
    half = np.uint64(_half(n))
    mask = np.uint64((1 << int(half)) - 1)
    found = places.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking) > FEW:
        value, key = found[walking], keys[walking]
        left, right = value >> half, value & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix_each((key + np.uint64(turn)) ^ (right << np.uint64(8))) & mask)
        found[walking] = value = (left << half) | right
        walking = walking[value >= n]
    for i in walking.tolist():  # of so few, numbers are faster than arrays
        found[i] = permuted(int(found[i]), n, int(keys[i]))
    return found.astype(np.int64)


def _half(n: int) -> int:
    """Half of the bits of the network that holds 0 .. n-1."""
    return max(1, ((n - 1).bit_length() + 1) // 2)


def overlapping(n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that predict every token of a stream but the first exactly once, nearly all from half a window or more.

    Window w reads the tokens from ``starts[w]`` on and predicts the `length` tokens after the first. Consecutive
    windows overlap by half, and of each only the predictions from ``fresh_from[w]`` on, which no earlier one made,
    count.

    Args:
        n: tokens of the stream, more than `length`.
        length: tokens read by a window.

    Returns:
        starts, fresh_from: int64, shape (windows,).

    Example:
        >>> overlapping(n=12, length=4)
        (array([0, 2, 4, 6, 7]), array([0, 2, 2, 2, 3]))
    """
    last = n - 1 - length
    starts = np.append(np.arange(0, last, max(1, length // 2)), last)
    return starts, np.append(0, starts[:-1] + length - starts[1:])
