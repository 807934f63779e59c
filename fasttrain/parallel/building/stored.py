"""Safetensors files of one model, of which a part of a tensor is read without the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 16 << 20  # bytes of a file that are mapped at a time
INDEX = ".safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class Stored:
    """The tensors of a file, of a directory, or of those that an index names.

    Attributes:
        files: where each tensor is, by its name.
        shapes: of each.
        dtypes: of each; the file's own word for one that is not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an index names files elsewhere, or a tensor that its file lacks; or two files have one name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        wanted, files = found_at(self.path)
        for file in files:
            with opened(file) as content:
                names = content.keys()
                for name in names:
                    if wanted is not None and wanted.get(name) != file.name:
                        continue
                    if name in self.files:
                        raise ValueError(f"{name} is in {self.files[name]} and in {file}: give one of them, or the "
                                         "index of both")
                    self.files[name] = file
                    about = content.get_slice(name)
                    self.shapes[name] = tuple(about.get_shape())
                    self.dtypes[name] = DTYPES.get(about.get_dtype(), about.get_dtype())
        if wanted is not None and (lacking := sorted(set(wanted) - set(self.files))):
            raise ValueError(f"{self.path} names {lacking[0]}, which {wanted[lacking[0]]} does not have: the files are "
                             "of different models, or not all there")

    def parts(self, name: str, held: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of a tensor after the other: (which of the rows that are held, their elements that are held).

        Arguments:
            held: for each dimension, the indices that are wanted of it, ascending.

        No more than `AT_ONCE` bytes of the file, or one row if that is more, are in memory at a time.
        """
        shape, file = self.shapes[name], self.files[name]
        if not shape:
            with opened(file) as content:
                yield slice(None), content.get_tensor(name)
            return
        if any(len(index) == 0 for index in held):
            return
        spans = tuple(slice(int(index[0]), int(index[-1]) + 1) for index in held[1:])
        within = [index - index[0] for index in held[1:]]
        row = max(1, getattr(self.dtypes[name], "itemsize", 1) * torch.Size(shape[1:]).numel())
        for begin, end in runs(held[0], max(1, AT_ONCE // row)):
            first = int(held[0][begin])
            with opened(file) as content:  # once more for each: what is mapped is counted as this process's memory
                some = content.get_slice(name)[(slice(first, first + end - begin), *spans)]
                for dim, index in enumerate(within, 1):
                    if len(index) != some.shape[dim]:
                        some = some.index_select(dim, index)
                yield slice(begin, end), some


def runs(index: Tensor, most: int) -> Iterator[tuple[int, int]]:
    """Where indices follow one another, `most` of them at a time.

    Example:
        >>> list(runs(torch.tensor([2, 3, 4, 8, 9]), 2))
        [(0, 2), (2, 3), (3, 5)]
    """
    ends = [*((index.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(index)]
    begin = 0
    for end in ends:
        for one in range(begin, end, most):
            yield one, min(one + most, end)
        begin = end


def opened(file: Path) -> Any:
    """A file of safetensors, mapped."""
    from safetensors import safe_open

    return safe_open(file, "pt")


def found_at(path: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """(the file of each name, if an index tells; the files)."""
    if path.is_dir():
        indices, files = sorted(path.glob("*" + INDEX)), sorted(path.glob("*.safetensors"))
        if len(indices) > 1:
            raise ValueError(f"{path} has several indices, {', '.join(each.name for each in indices)}: give one")
        if not indices and not files:
            raise FileNotFoundError(f"{path} has neither files of safetensors nor an index of such: give the directory "
                                    "or the file that has the weights")
        return found_at(indices[0]) if indices else (None, files)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give a file of safetensors, an index of such, or a directory")
    if not path.name.endswith(".json"):
        return None, [path]
    told = json.loads(path.read_text())
    wanted = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values()):
        raise ValueError(f"{path} is no index of safetensors: it has no weight_map from names to files")
    for name in set(wanted.values()):
        if Path(name).name != name:
            raise ValueError(f"{path} names the file {name!r}: those of an index lie beside it")
    return wanted, [path.parent / name for name in sorted(set(wanted.values()))]
