"""The weights of a file in a model, each process reading its own part only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from fasttrain.optim.local import local, positions
from fasttrain.parallel.building.buffers import build_all, builders_of
from fasttrain.parallel.building.stored import Stored
from fasttrain.parallel.building.tensors import Held, device_for, held, replace
from fasttrain.parallel.wrapped import bare

if TYPE_CHECKING:
    from fasttrain.dist.wire import Wire

M = TypeVar("M", bound=nn.Module)
Names = Mapping[str, str] | Callable[[str], str]
SHOWN = 20  # names of a kind, in an error


def load_pretrained(model: M, path: str | os.PathLike[str], *, names: Names | None = None, strict: bool = True,
                    device: torch.device | str | None = None, tied: Mapping[str, str] | None = None,
                    wire: Wire | None = None) -> M:
    """Read the parameters and persistent buffers of a model from safetensors, each process its local parts only.

    What is on meta gets memory, all else is overwritten in place. Parts are read a few megabytes at a time and cast to
    the dtype that the model has, so that no process ever holds more of a parameter than its part. Buffers outside of
    the state dict that are on meta are computed, as of `materialize`, which gives values to what is missing.

    Arguments:
        model: plain, cut by `parallelize_module`, `tensor_parallel` or `fully_shard`, or one stage of a pipeline.
        path: of a file, of an index (``model.safetensors.index.json``), or of a directory with either.
        names: of a parameter in the file, given that in the original model: a dict (names that it lacks are the same)
            or a function. A tied parameter is read by any of its names.
        strict: raise for names that only one side has. If not, what is missing stays as it is, perhaps on meta, and
            what is unexpected is not read.
        device, tied: as of `materialize`.
        wire: to all ranks. Errors are then the same on each, and what another stage of a pipeline has is expected.

    Returns:
        The model.

    Raises:
        ValueError: names are missing or unexpected, or shapes differ: all are named, and nothing was changed.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with torch.device("meta"):
        ...     model = nn.Linear(3, 2)
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     save_file({"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}, file.name)
        ...     load_pretrained(model, file.name, names=lambda name: f"fc.{name}")
        Linear(in_features=3, out_features=2, bias=True)
        >>> model.weight.sum()
        tensor(6., grad_fn=...)
    """
    stored, everything = Stored(path), held(model, tied)
    wanted = {one: alternatives(one, names) for one in everything if one.persistent}
    computed = [one for one in everything if not one.persistent and one.on_meta]
    builders = builders_of(bare(model), computed)
    trouble, used = compare(wanted, stored)
    trouble["buffers on meta that no build_buffers() makes"] = [one.names[0] for one in computed
                                                                if one.name not in builders]
    report(stored, trouble, used, strict, wire)
    where = torch.device(device) if device is not None else None
    with torch.no_grad():
        for one, theirs in wanted.items():
            for name in theirs:
                if name in stored.files:
                    read(one, stored, name, where)
                    break
        build_all(computed, builders, where)
    return model


def alternatives(one: Held, names: Names | None) -> list[str]:
    """What a tensor may be called in the file."""
    own = list(dict.fromkeys([one.name, *one.names]))
    if names is None:
        return own
    return [names(name) if callable(names) else names.get(name, name) for name in own]


def compare(wanted: Mapping[Held, list[str]], stored: Stored) -> tuple[dict[str, list[str]], set[str]]:
    """(what is wrong by kind, the names in the file that this model has)."""
    missing, differ, used = [], [], set()
    for one, theirs in wanted.items():
        used.update(theirs)
        name = next((name for name in theirs if name in stored.files), None)
        if name is None:
            missing.append(one.names[0] + (f" (there {theirs[0]})" if theirs[0] not in one.names else ""))
            continue
        shape, dtype = stored.shapes[name], stored.dtypes[name]
        if shape != tuple(one.tensor.shape):
            differ.append(f"{one.names[0]}: {tuple(one.tensor.shape)} here, {shape} in the file")
        elif isinstance(dtype, str) or dtype.is_floating_point != one.tensor.dtype.is_floating_point:
            differ.append(f"{one.names[0]}: {one.tensor.dtype} here, {dtype} in the file")
    return {"missing in the file": missing, "of another shape or kind": differ}, used


def report(stored: Stored, trouble: dict[str, list[str]], used: set[str], strict: bool, wire: Wire | None) -> None:
    """Raise if something is wrong, on every rank alike if there is a wire."""
    told = [(trouble, sorted(used & set(stored.files)))]
    if wire is not None:
        told = [json.loads(text) for text in wire.gather_objects_json(json.dumps(told[0]))]
    known = {name for _, names in told for name in names}
    found: dict[str, list[str]] = {}
    for kinds, _ in told:
        for kind, lines in kinds.items():
            found.setdefault(kind, []).extend(line for line in lines if line not in found.get(kind, []))
    found["unexpected in the file"] = sorted(set(stored.files) - known)
    if not strict:
        found["missing in the file"] = found["unexpected in the file"] = []
    if not any(found.values()):
        return
    lines = [f"{stored.path} does not fit the model:"]
    for kind, names in found.items():
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {kind} ({len(names)}): {', '.join(names[:SHOWN])}{more}")
    hint = "" if wire is not None else ", give wire= if this is one stage of several"
    lines.append(f"rename by names={{ours: theirs}}{hint}, or leave both as they are by strict=False")
    raise ValueError("\n".join(lines))


def read(one: Held, stored: Stored, name: str, device: torch.device | None) -> None:
    """Fill a tensor's local part, in new memory if it is on meta."""
    part = local(one.tensor)
    out = torch.empty_like(part, device=device_for(one, device)) if one.on_meta else part
    for rows, some in stored.parts(name, positions(one.tensor)):
        (out[rows] if out.dim() else out).copy_(some)
    if one.on_meta:
        replace(one, out)
