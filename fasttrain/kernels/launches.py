"""The launches of a step that the host drives, on CUDA and in Triton alike: their tables stay on the device.

What changes from step to step, rows of coefficients and addresses of gradients, goes there in one copy for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from fasttrain.kernels import kept_table, table
from fasttrain.kernels.item import Item
from fasttrain.kernels.place import Place
from fasttrain.kernels.resident import Column, Resident, Tables, making

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Launches:
    """The launches over items whose gradients alone may lie elsewhere at the next step.

    Attributes:
        on_device: live are the rows of each and then its column of gradients' addresses, fixed its chunk table.
        chunks: of each.
        widths: numbers of a row of each.
    """

    on_device: Resident
    chunks: tuple[int, ...]
    gradients: tuple[Column, ...]
    widths: tuple[int, ...]


def ready(tables: Tables[Launches], place: Place, device: torch.device, stream: int,
          groups: Sequence[tuple[Name, list[Item]]], chunk_of: Callable[[Sequence[Item]], int],
          use: Callable[[Name], Any]) -> Launches:
    """The launches over groups of items of one device, each (what tells its kernel from others, items).

    Arguments:
        tables: what is kept from steps before.
        chunk_of: elements of a chunk of a group.
        use: called once of each kernel that has work, so that what it lacks memory for is known before a launch.

    Raises:
        torch.OutOfMemoryError: there is no memory left; the message says what to do.
    """
    rows, fixed, moving = [], [], []
    for _, items in groups:
        kind: Any = table if items[0].plain else kept_table
        own, row_of = kind.rows(items)
        described = kind.describe(items, row_of)
        rows.append(own)
        moving.append(described[:, 1].copy())
        described[:, 1] = 0
        fixed.append(described)
    key = (device, stream, *((name, one.tobytes()) for (name, _), one in zip(groups, fixed, strict=True)))
    made = tables.get(key)
    with making("the tables of a step", device):
        if made is None:
            made = prepare(place, groups, fixed, rows, moving, chunk_of, use)
        else:
            made.on_device.update(place, live(rows, made.gradients, moving))
    tables.keep(key, made, made.on_device.memory.nbytes)
    return made


def prepare(place: Place, groups: Sequence[tuple[Name, list[Item]]], fixed: Sequence[np.ndarray],
            rows: Sequence[np.ndarray], moving: Sequence[np.ndarray], chunk_of: Callable[[Sequence[Item]], int],
            use: Callable[[Name], Any]) -> Launches:
    """The tables on the device, and the code of their kernels: all that a launch might lack memory for."""
    built, columns = [], []
    for (name, items), described in zip(groups, fixed, strict=True):
        chunks, column = chunked(items, chunk_of(items), described)
        built.append(chunks)
        columns.append(column)
        if len(chunks):
            use(name)
    return Launches(Resident(place, live(rows, columns, moving), built), tuple(map(len, built)), tuple(columns),
                    tuple(own.shape[1] for own in rows))


def chunked(items: Sequence[Item], chunk: int, described: np.ndarray) -> tuple[np.ndarray, Column]:
    """The chunk table of items, described without the addresses of their gradients, and the column of these."""
    kind: Any = table if items[0].plain else kept_table
    elements = np.array([item.tensors[0].numel() for item in items], np.int64)
    built = kind.build(items, chunk, described)
    return built, Column(np.repeat(np.arange(len(items)), -(-elements // chunk)), built[:, 1].copy())


def live(rows: Sequence[np.ndarray], columns: Sequence[Column], moving: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What changes from step to step: rows of coefficients, and the addresses of the chunks' gradients."""
    return [*rows, *(column.addresses(own) for column, own in zip(columns, moving, strict=True))]
