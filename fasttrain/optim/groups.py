"""The parameters of an optimizer by their place in its groups: added, checked against the options, and named."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fasttrain.optim import kept
from fasttrain.optim.page import Group, Page
from fasttrain.optim.part import called, declared
from fasttrain.precision.storage import DEFAULTS, describe, is_plain, normalised

BUCKET = 64 << 20  # bytes of gradients that travel together to the host, where an optimizer is offloaded


def lists_of(optimizer: Any) -> list[list[Tensor]]:
    """The parameters of every group."""
    return [params if isinstance(params := group["params"], list) else list(params)
            for group in optimizer.param_groups]


class Groups(Page):
    """Parameter groups, and the storage options that every group has.

    A place is a parameter's (group, index in it).
    """

    backend: str | None = None
    offload: bool = False
    offload_bucket: int = BUCKET
    _host: Any = None  # the host's side of an offloaded optimizer
    _storage: Mapping[str, Any] = {}
    _capturable: bool = False  # devices drive every step (`fasttrain.optim.drive`)
    _drive: Any = None
    _plan: Any = None
    vouched: Any = None  # of the next step: nothing but values changed since the last with an equal one
    _vouched: Any = None  # of this step
    _afar: Any = None  # what is stepped on other devices (`fasttrain.optim.afar`)
    _planned_for: Any = None  # the rule of each group, the backend that is forced, and options of each group
    _places: list[tuple[int, int]]  # in the order of the plan

    def _take(self, options: dict[str, Any]) -> None:
        """Keep the options that every optimizer has. Before torch's constructor, which adds the parameter groups."""
        self.backend = options.pop("backend", None)
        self._capturable = bool(options.pop("capturable", False))
        self.offload, self.offload_bucket = options.pop("offload", False), options.pop("offload_bucket", BUCKET)
        if not isinstance(self.offload, bool):
            raise TypeError(f"offload={self.offload!r} must be True or False")
        if isinstance(self.offload_bucket, bool) or not isinstance(self.offload_bucket, int) or self.offload_bucket < 1:
            raise ValueError(f"offload_bucket={self.offload_bucket!r} must be a positive number of bytes")
        self._storage = normalised(options)
        self._remainders: dict[int, Tensor] = {}  # second arrays of parameters that have no state yet, by id
        self._arrived: set[int] = set()  # parameters that were stepped before `step`, by id
        self._versions: dict[int, int] = {}  # of parameters stepped as items and watched, by id, after our last write
        if unknown := [name for name in options if name != "storage" and name not in DEFAULTS]:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(map(repr, unknown))}")

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as torch does; the same parameter twice in it is an error.

        Raises:
            ValueError: a parameter occurs twice: it would be stepped twice; or a storage option is wrong.
        """
        options = {**self._storage, **normalised(param_group)}
        param_group.pop("storage", None)
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({id(p) for p in params}) != len(params):
            twice = next(i for i, p in enumerate(params) if any(p is other for other in params[:i]))
            message = f"{self._name((len(self.param_groups) - 1, twice))} occurs twice in its group: give it once"
            self.param_groups.pop()
            raise ValueError(message)
        self.param_groups[-1].update(options)
        try:
            self._check_kept(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _on_host(self) -> Any:
        """The host's side of this optimizer (`fasttrain.optim.offload`); None where it steps its parameters itself."""
        return None

    def _check_kept(self, index: int) -> None:
        """Refuse parameters that the options of their group cannot keep."""
        group = self.param_groups[index]
        if not self.takes_storage(group) and not (is_plain(group) and group.get("clip_each") is None):
            raise ValueError(f"group {index} is given {describe(group)}; {type(self).__name__} does not step it "
                             "element by element, and keeps it as torch would: leave these options out")
        if not is_plain(group):
            group.setdefault("maximize", False)
            widened = []
            for place, p in enumerate(group["params"]):
                name = self._name((index, place))
                if self._layout(name, p, p.dtype, group, self.rule_of(group)).widened and declared(p) is None:
                    widened.append(name)
            if widened:
                warnings.warn(f"group {index} keeps fp32 states for {', '.join(widened)} in spite of "
                              f"{describe(group)}: its shards cut blocks of {kept.BLOCKS} elements", stacklevel=5)

    def _param(self, where: tuple[int, int]) -> Tensor:
        return self.param_groups[where[0]]["params"][where[1]]

    def _name(self, where: tuple[int, int]) -> str:
        group, index = where
        names = self.param_groups[group].get("param_names")
        if names:
            return f"parameter {names[index]!r}"
        return f"parameter {index} of group {group} (shape {tuple(self._param(where).shape)})"

    def _identity(self, where: tuple[int, int]) -> int:
        """64 bits that stand for a parameter in random draws: of its name if it has one, else of its place."""
        if (part := declared(self._param(where))) is not None:
            return part.identity
        names = self.param_groups[where[0]].get("param_names")
        before = sum(len(group["params"]) for group in self.param_groups[: where[0]])
        told = called(self._param(where)) or (names[where[1]] if names else str(before + where[1]))
        return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "little")
