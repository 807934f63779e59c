"""What must be the same on every rank, in 32 bytes; and where it is not, the difference in words, the same on every rank.

Ranks that disagree on the order, the shapes or the dtypes of their parameters would add numbers that do not belong
together, or wait for each other for ever. So before the first collective of a training they compare a fingerprint.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

import fasttrain
from fasttrain.dist import difference
from fasttrain.dist.layout import FlatLayout, canonical
from fasttrain.dist.slots import Entry, dtype_name, ordinals

FORMAT = 1
MOST_KINDS = 4  # of ranks that differ, whose differences are told


class DisagreementError(ValueError):
    """The ranks were not built alike. Every rank raises it with the same text."""


class Gathers(Protocol):
    """What is needed of a `fasttrain.dist.wire.Wire`."""

    rank: int
    ranks: list[int]  # the members' numbers among all processes
    device: torch.device

    def all_gather(self, tensor: Tensor) -> list[Tensor]: ...

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Fingerprint:
    """All that must agree, as canonical JSON, and its digest."""

    details: str

    @property
    def digest(self) -> Tensor:
        """32 bytes (uint8, shape (32,), on the CPU)."""
        return _tensor(hashlib.sha256(self.details.encode()).digest())


def fingerprint(entries: Sequence[Entry], layout: FlatLayout, options: Mapping[str, Any] | None = None,
                versions: Mapping[str, str] | None = None, mesh: Mapping[str, int] | None = None) -> Fingerprint:
    """The fingerprint of a rank.

    Arguments:
        entries: all parameters in the order of registration, those without a gradient too.
        layout: of their gradients.
        options: whatever else must agree, by name: numbers, texts, booleans, None, dtypes, devices (their type counts),
            functions and classes (their names count), and lists and mappings of these.
        versions: by package; None: of torch and fasttrain.
        mesh: the size of each dimension by its name, in their order.

    Raises:
        TypeError: an option of another kind.
        ValueError: entries of one name.

    Example:
        >>> entries = [Entry("weight", (2, 2), torch.float32)]
        >>> fingerprint(entries, FlatLayout.of(entries, 2), {"zero": 1}).digest.shape
        torch.Size([32])
    """
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("several entries have one name: give each a name of its own, and a tied parameter once")
    devices = ordinals(entries)
    parameters = [{"name": entry.name, "shape": entry.shape, "stride": entry.stride, "dtype": dtype_name(entry.dtype),
                   "device": devices[entry.device], "group": entry.group, "requires_grad": entry.requires_grad}
                  for entry in entries]
    if versions is None:
        versions = {"torch": str(torch.__version__), "fasttrain": fasttrain.__version__}
    laid = {name: value for name, value in layout.portable().items() if name != "entries"}
    return Fingerprint(canonical({
        "format": FORMAT, "parameters": parameters, "layout": laid, "mesh": list((mesh or {}).items()),
        "options": {name: plain(value, name) for name, value in (options or {}).items()}, "versions": dict(versions)}))


def plain(value: Any, name: str) -> Any:
    """An option as JSON has it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, torch.device):
        return value.type
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Mapping):
        return {str(key): plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, f"{name}[{place}]") for place, inner in enumerate(value)]
    raise TypeError(f"the option {name} is {value!r}, which cannot be compared between ranks: give numbers, texts, "
                    "booleans, None, dtypes, devices, functions, or lists and mappings of these")


def agree(wire: Gathers, mine: Fingerprint) -> None:
    """Raise on every rank if the fingerprints differ. A collective: every rank calls it.

    All ranks exchange 40 bytes. Only if these differ, one rank of each kind (of the most frequent, and of up to four more)
    sends its details to all.

    Raises:
        DisagreementError: they differ: which ranks, and in what.
    """
    details = mine.details.encode()
    header = torch.cat([mine.digest, _tensor(len(details).to_bytes(8, "little"))])
    headers = [bytes(found.tolist()) for found in wire.all_gather(header.to(wire.device))]
    kinds = _kinds(headers)
    if len(kinds) == 1:
        return
    told = []
    for place, ranks in enumerate(kinds):
        text = None
        if place <= MOST_KINDS:
            room = torch.zeros(int.from_bytes(headers[ranks[0]][32:], "little"), dtype=torch.uint8, device=wire.device)
            if wire.rank == ranks[0]:
                room.copy_(_tensor(details))
            text = bytes(wire.broadcast_(room, ranks[0]).tolist()).decode()
        told.append(([wire.ranks[rank] for rank in ranks], text))
    raise DisagreementError(_text(told))


def compare(details: Sequence[str]) -> str | None:
    """The difference between the details of all ranks, given in their order, in words; None if there is none.

    The ranks that are told to differ are those that are not of the most frequent kind (of equally frequent ones, of that
    of the lowest rank).

    Example:
        >>> entries = [Entry("weight", (2, 2), torch.float32)]
        >>> layout = FlatLayout.of(entries, 3)
        >>> print(compare([fingerprint(entries, layout, {"zero": zero}).details for zero in (1, 2, 1)]))
        The ranks were not built alike.
        Rank 1 differs from ranks 0, 2:
          options.zero: 2 on rank 1, 1 on rank 0
        Build the same model with the same options and versions on every rank.
    """
    kinds = _kinds(details)
    return _text([(ranks, details[ranks[0]]) for ranks in kinds]) if len(kinds) > 1 else None


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _kinds(values: Sequence[Any]) -> list[list[int]]:
    """The ranks of each value, of the most frequent first."""
    found: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        found.setdefault(value, []).append(rank)
    return sorted(found.values(), key=lambda ranks: (-len(ranks), ranks[0]))


def _text(kinds: Sequence[tuple[list[int], str | None]]) -> str:
    lines = ["The ranks were not built alike."]
    (usual, usual_details), *others = kinds
    untold: list[int] = []
    for place, (ranks, details) in enumerate(others):
        if details is None or place >= MOST_KINDS:
            untold += ranks
            continue
        lines.append(f"{_named(ranks).capitalize()} {'differs' if len(ranks) == 1 else 'differ'} from {_named(usual)}:")
        found = difference.of(json.loads(details), json.loads(usual_details or ""), f"rank {ranks[0]}", f"rank {usual[0]}")
        lines += [f"  {line}" for line in found]
    if untold:
        lines.append(f"{_named(sorted(untold)).capitalize()} differ in other ways still.")
    return "\n".join([*lines, "Build the same model with the same options and versions on every rank."])


def _named(ranks: Sequence[int], most: int = 8) -> str:
    """Ranks as a text: stretches of three and more by their ends.

    Example:
        >>> _named([0, 1, 2, 3, 5, 7, 8])
        'ranks 0-3, 5, 7, 8'
    """
    runs: list[str] = []
    for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in run]
        runs += [f"{members[0]}-{members[-1]}"] if len(members) > 2 else map(str, members)
    shown = ", ".join(runs[:most]) + (f" and others, {len(ranks)} in all" if len(runs) > most else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
