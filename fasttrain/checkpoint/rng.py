"""Random number generators as an entry of a state: of every library and every rank."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class Rng:
    """The generators of Python, numpy and torch (CPU and the current GPU), and others that are given.

    Every rank has its own. On another number of ranks, those that there were go on with theirs; others get new ones,
    which are a function of what was saved and of the rank.

    Arguments:
        others: by name, `torch.Generator`, `numpy.random.Generator` or `random.Random`.

    Example:
        >>> rng = Rng()
        >>> state, before = rng.state_dict(), torch.rand(2)
        >>> rng.load_state_dict(state)
        >>> torch.equal(torch.rand(2), before)
        True
    """

    per_rank = True

    def __init__(self, **others: Any):
        for name, generator in others.items():
            if not isinstance(generator, (torch.Generator, np.random.Generator, random.Random)):
                raise TypeError(f"{name} is a {type(generator).__name__}: give a torch.Generator, "
                                "numpy.random.Generator or random.Random")
        self.others = others

    def state_dict(self) -> dict[str, Any]:
        """The states of all."""
        found: dict[str, Any] = {"python": _of(random), "numpy": _numpy(np.random.get_state(legacy=False)),
                                 "torch": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found["cuda"] = torch.cuda.get_rng_state()
        for name, generator in self.others.items():
            found[f"other/{name}"] = _of(generator)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it has not the generators that there are here; nothing was changed.
        """
        wanted = {f"other/{name}" for name in self.others}
        given = {name for name in state if name.startswith("other/")}
        if wanted != given:
            raise ValueError(f"the checkpoint has the generators {sorted(given)}, and {sorted(wanted)} are here")
        _into(random, state["python"])
        np.random.set_state(_numpy_back(state["numpy"]))
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        for name, generator in self.others.items():
            _into(generator, state[f"other/{name}"])

    def of_rank(self, state: Mapping[str, Any], rank: int, world: int) -> None:
        """Take over the state of rank `rank % world`; a rank that there was not before starts anew from it."""
        self.load_state_dict(state)
        if rank < world:
            return
        told = hashlib.blake2b(f"{rank}".encode(), key=bytes(state["torch"].numpy().tobytes()[:64]), digest_size=8)
        seed = int.from_bytes(told.digest(), "little") >> 1
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.manual_seed(seed)
        for generator in self.others.values():
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, random.Random):
                generator.seed(seed)
            else:
                generator.bit_generator.state = type(generator.bit_generator)(seed).state


def _of(generator: Any) -> Any:
    """The state of one generator: arrays for the long ones."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _numpy(generator.bit_generator.state)
    version, words, gauss = generator.getstate()
    return {"version": version, "words": np.array(words, np.uint32), "gauss": gauss}


def _into(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu() if generator.device.type == "cpu" else state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _numpy_back(state)
    else:
        generator.setstate((state["version"], tuple(map(int, state["words"])), state["gauss"]))


def _numpy(state: Any) -> dict[str, Any]:
    return {key: _numpy(value) if isinstance(value, dict) else value for key, value in state.items()}


def _numpy_back(state: Any) -> Any:
    return {key: _numpy_back(value) if isinstance(value, dict) else value for key, value in state.items()}
