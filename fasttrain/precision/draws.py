"""Random bits for stochastic rounding: a pure function of (seed, step, parameter, operand, index in that parameter).

The index is that of the full parameter, in row-major order, also where this process holds a shard of it. No state is
kept, so neither threads, chunks, shards nor backends change what is drawn. The generator hashes the index with 64 bits
of key: two rounds of multiply and shift (the constants are those of Chris Wellons' `lowbias32`), half of the key before
each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORD = (1 << 32) - 1
LONG = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio
HIGH = 0x9E3779B1            # what the upper half of an index is multiplied with


def mix(x: Any) -> Any:
    """A bijection of 64 bits in which every output bit depends on every input bit (the finaliser of SplitMix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & LONG
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & LONG
    return x ^ (x >> 31)


def step_key(seed: int, step: int) -> int:
    """The key of one step of a run."""
    return mix((mix(seed & LONG) + step) & LONG)


def parameter_key(key: Any, identity: Any) -> Any:
    """The key of one parameter in the step whose key is given."""
    return mix(key ^ mix((identity + GOLDEN) & LONG))


def operand_key(key: Any, operand: int) -> Any:
    """The key of one of p (0), g (1), the states (2, ...) and the EMA (after them). `key`: one, or a uint64 array."""
    return mix((key + (operand * GOLDEN & LONG)) & LONG)


def random_bits(key: int, index: Tensor) -> Tensor:
    """32 random bits for each index.

    Arguments:
        key: of an operand, 64 bits.
        index: int64, not negative: places in the full parameter.

    Returns:
        int64, of the shape of `index`, in [0, 2^32).

    Example:
        >>> random_bits(operand_key(parameter_key(step_key(0, 1), 0), 0), torch.arange(2))
        tensor([2599939540, 3009031231])
    """
    before, after = key & WORD, key >> 32
    x = ((index & WORD) + before) & WORD
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & WORD
    x = x ^ (x >> 15)
    x = x ^ after ^ (((index >> 32) * HIGH) & WORD)
    x = (x * 0x846CA68B) & WORD
    return x ^ (x >> 16)


def random_words(key: int, index: Tensor) -> Tensor:
    """`random_bits` in half of the memory: the same 32 bits, as int32, whose sign is the highest of them.

    Example:
        >>> index = torch.arange(4)
        >>> torch.equal(random_words(1 << 40, index).long() & WORD, random_bits(1 << 40, index))
        True
    """
    before, after = signed(key & WORD), signed(key >> 32)
    x = index.to(torch.int32).add_(before)  # integers of torch wrap around
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x ^= after
    if index.device.type != "cpu" or (index.numel() and int(index.max()) > WORD):  # a GPU is not waited for
        x ^= (index >> 32).to(torch.int32).mul_(signed(HIGH))
    x *= signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def signed(word: int) -> int:
    """32 bits as a number with a sign."""
    return word - (1 << 32) if word >> 31 else word


def full_index(place: tuple[int, int, int], count: int, device: torch.device) -> Tensor:
    """Where each of `count` local elements lies in the full parameter.

    Arguments:
        place: (first, run, pitch): local element i lies at first + (i // run) * pitch + i % run; a run of 0 is endless.
    """
    first, run, pitch = place
    i = torch.arange(count, device=device)
    return first + i if run == 0 else first + i // run * pitch + i % run
