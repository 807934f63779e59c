"""The CUDA backend: kernels compiled ahead of time (`step.fatbin`) or at first use, started through the driver API.

One launch for each (rule, storage combination, device), whatever the number of parameters. Their chunk tables stay on
the device (`resident`); what changed since the last step, rows of coefficients and addresses of gradients, goes there
in one copy for all of them, from a ring of pinned slots (`ring`). Work is ordered on torch's current stream (`place`).

What is compiled ahead: every built-in rule with the plain storages of `FASTTRAIN_PLAIN` and `FASTTRAIN_MIXED`
(csrc/cuda/step.cu), and the usual storages of AdamW, Lion and SGD with momentum in `FASTTRAIN_KEPT`
(csrc/cuda/kept.cuh), with or without clipping by value and zeroing of gradients. Other rules and storages are compiled
when they are first stepped (`nvrtc`), and so is everything where the build had no nvcc. What cannot be, and every item
with an EMA, runs in Triton, to the same bits. Reductions are in `cuda_sums`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import emit_cuda, launches, native, table
from fasttrain.kernels.cuda_code import Code
from fasttrain.kernels.emit_cuda import NAMES, codec_name
from fasttrain.kernels.item import Item, dense
from fasttrain.kernels.launches import Launches
from fasttrain.kernels.launches import live as live
from fasttrain.kernels.place import Place as Place
from fasttrain.kernels.resident import Parcel as Parcel
from fasttrain.kernels.resident import Tables as Tables
from fasttrain.rule import Rule

LIBRARY = "libcuda.so.1"
IMAGE = Path(__file__).parents[1] / "step.fatbin"
OLDEST = (8, 0)  # compute capability: bfloat16 conversions, and the oldest code in the image
THREADS = 256  # of a block, as kThreads in csrc/cuda/step.cu
TILE = 4096  # elements that a block takes at once in 16-bit storages
CHUNKS_PER_PROCESSOR = 32  # so many that multiprocessors end at about the same time


# --- What can run -----------------------------------------------------------------------------------------------------

def why_not(device: torch.device) -> str | None:
    """Why this backend cannot step tensors on `device`."""
    if device.type != "cuda":
        return f"it steps tensors in the memory of an NVIDIA GPU, not on {device.type}"
    if native.load()[1]:
        return native.load()[1]
    return code(place_of(device).ordinal())[1] or None


@cache
def driver() -> tuple[Any, str]:
    """The CUDA driver, or None and the reason why there is none."""
    try:
        return native.module().Driver(LIBRARY), ""
    except RuntimeError as error:
        return None, f"there is no CUDA driver: {error}"


@cache
def code(ordinal: int) -> tuple[Code | None, str]:
    """The device code, loaded on one GPU, or None and the reason why it cannot be."""
    cuda, reason = driver()
    if cuda is None:
        return None, reason
    built = native.build_info()
    try:
        capability = cuda.capability(ordinal)
        if capability < OLDEST:
            return None, (f"GPU {ordinal} has compute capability {capability[0]}.{capability[1]}; these kernels need "
                          f"{OLDEST[0]}.{OLDEST[1]} or newer")
        if IMAGE.is_file():
            return Code(cuda, ordinal, cuda.load(IMAGE.read_bytes(), ordinal)), ""
    except RuntimeError as error:
        version = cuda.version()
        return None, (f"GPU {ordinal} cannot load {IMAGE.name} ({', '.join(built['cuda'])}, built with nvcc "
                      f"{built['nvcc']}): {error}. The driver is for CUDA {version // 1000}.{version % 1000 // 10}: "
                      "install a newer driver, or build with an older toolkit")
    on_demand = Code(cuda, ordinal, None)
    loaded, reason = on_demand.load("tree", emit_cuda.listed("tree"))  # the smallest, to see that it can be done
    if loaded is None:
        return None, (f"this build has no device code ({built['cuda_reason']}), and none can be compiled at run time: "
                      f"{reason}")
    return on_demand, ""


@cache
def compiled() -> frozenset[str]:
    """The names of the kernels that are compiled ahead of time."""
    return frozenset(native.module().cuda_kernels())


@cache
def kernel_name(rule: Rule, dtypes: tuple[torch.dtype, ...], codecs: tuple[int, ...] = ()) -> str | None:
    """The kernel for a rule whose p, g and states have these dtypes, or None if it is not compiled ahead of time.

    Arguments:
        codecs: of items that are not plain: of p, g, the states, and the EMA if there is one.
    """
    if codecs:
        kept = "_".join(codec_name(number) for number in codecs)
        known = native.number_of(rule) is not None and f"kept_{rule.name}_{kept}" in compiled()
        return f"kept_{rule.name}_{kept}" if known else None
    p, g, *states = dtypes
    if not native.is_built(rule) or any(dtype != states[0] for dtype in states):
        return None
    name = f"step_{rule.name}_{NAMES[p]}_{NAMES[g]}_{NAMES[states[0] if states else p]}"
    return name if name in compiled() else None


@cache
def kernel_of(rule: Rule, dtypes: tuple[torch.dtype, ...], codecs: tuple[int, ...],
              device: torch.device) -> tuple[str | None, str]:
    """The kernel that steps such items on a device, compiled now if need be, or None and why there is none."""
    name = kernel_name(rule, dtypes, codecs)
    loaded, reason = code(place_of(device).ordinal())
    return (name, reason) if loaded is None else loaded.find(name, rule, dtypes, codecs)


place_of: Any = Place  # torch's side of a device; tests put a host in its place


# --- The step ---------------------------------------------------------------------------------------------------------

def step(items: Sequence[Item]) -> None:
    """Step every item. What has no kernel here runs on the Triton or the reference backend."""
    known: list[Item] = []
    others: list[Item] = []
    for item in items:
        p = item.tensors[0]
        name, _ = kernel_of(item.rule, tuple(tensor.dtype for tensor in item.tensors), item.codecs, p.device)
        (others if name is None else known).append(item)
    with dense(known) as walkable:
        groups = table.grouped(walkable)
        starts = [ready(device, [(kernel_of(kind.rule, kind.dtypes, kind.codecs, device)[0], group)
                                 for kind, group in groups.items() if kind.device == device])
                  for device in {kind.device: None for kind in groups}]
        for begin in starts:  # when nothing more takes memory
            begin()
        torch.autograd.graph.increment_version(
            [tensor for item in walkable for tensor in item.written if tensor is not item.counter])
    counters: dict[torch.device, list[Tensor]] = {}
    for item in known:
        if item.counter is not None:
            counters.setdefault(item.counter.device, []).append(item.counter)
    for group in counters.values():
        torch._foreach_add_(group, 1)
    step_elsewhere(others)


tables: Tables[Launches] = Tables()


def opened(device: torch.device) -> tuple[Any, Any, int]:
    """Torch's side of a device, the code that is loaded there, and the number of its multiprocessors."""
    place = place_of(device)
    loaded, reason = code(place.ordinal())
    if loaded is None:
        raise RuntimeError(f"the CUDA backend cannot step tensors on {device}: {reason}")
    return place, loaded, driver()[0].multiprocessors(place.ordinal())


def ready(device: torch.device, groups: Sequence[tuple[Any, list[Item]]]) -> Callable[[], None]:
    """What starts one kernel for each (name, items), all on one device and on torch's current stream there."""
    place, loaded, processors = opened(device)

    def chunk_of(items: Sequence[Item]) -> int:
        return chunk_size(sum(item.tensors[0].numel() for item in items), processors)

    with place.guard():
        stream = place.stream()
        made = launches.ready(tables, place, device, stream, groups, chunk_of, lambda name: loaded.usage(name, THREADS))
    return partial(start, place, loaded, stream, [name for name, _ in groups], made)


def start(place: Place, loaded: Any, stream: int, names: Sequence[str], made: Launches) -> None:
    addresses = made.on_device
    with place.guard():
        for index, (name, chunks) in enumerate(zip(names, made.chunks, strict=True)):
            if chunks:
                loaded.launch(kernel=name, blocks=chunks, threads=THREADS, stream=stream, table=addresses.fixed[index],
                              chunks=chunks, rows=addresses.live[index], gradients=addresses.live[len(names) + index])


class Standing:
    """What `fasttrain.kernels.standing` takes of this backend."""

    def __init__(self, device: torch.device) -> None:
        self.place, self.loaded, self.processors = opened(device)

    @staticmethod
    def takes(item: Item) -> bool:
        """Whether it has a kernel here."""
        dtypes = tuple(tensor.dtype for tensor in item.tensors)
        return kernel_of(item.rule, dtypes, item.codecs, item.tensors[0].device)[0] is not None

    def chunk_of(self, items: Sequence[Item]) -> int:
        return chunk_size(sum(item.tensors[0].numel() for item in items), self.processors)

    def name(self, kind: table.Kind) -> str:
        return str(kernel_of(kind.rule, kind.dtypes, kind.codecs, kind.device)[0])

    def use(self, kind: table.Kind) -> None:
        self.loaded.usage(self.name(kind), THREADS)

    def start(self, groups: Sequence[tuple[table.Kind, list[Item]]], made: Launches, clips: Sequence[bool]) -> None:
        start(self.place, self.loaded, self.place_stream(), [self.name(kind) for kind, _ in groups], made)

    def place_stream(self) -> int:
        with self.place.guard():
            return int(self.place.stream())


def chunk_size(elements: int, processors: int) -> int:
    """Elements of a chunk: one tile at least, and not so few that the table of a large model weighs."""
    wanted = elements // (processors * CHUNKS_PER_PROCESSOR)
    return min(max(-(-wanted // TILE), 1), 16) * TILE


def step_elsewhere(items: Sequence[Item]) -> None:
    """Step items that have no kernel here, and say once for each kind where."""
    from fasttrain.kernels import dispatch

    by_backend: dict[str, list[Item]] = {}
    for item in items:
        device = item.tensors[0].device
        reason = dispatch.load("triton").why_not(device) if device.type == "cuda" else f"it is on {device.type}"
        by_backend.setdefault("reference" if reason else "triton", []).append(item)
        if reason:
            dtypes = tuple(tensor.dtype for tensor in item.tensors)
            say_not_compiled(item.rule.name, item.codecs or dtypes,
                             kernel_of(item.rule, dtypes, item.codecs, device)[1], reason)
    for backend, group in by_backend.items():
        dispatch.load(backend).step(group)


@cache
def say_not_compiled(rule: str, storages: tuple[Any, ...], why_none: str, reason: str) -> None:
    kept = ", ".join(codec_name(one).lower() if isinstance(one, int) else str(one).removeprefix("torch.")
                     for one in storages)
    warnings.warn(f"rule {rule} with {kept} has no CUDA kernel in this build, none was compiled ({why_none}), "
                  f"and Triton cannot take it ({reason}): it runs on the slow reference backend", RuntimeWarning,
                  stacklevel=6)
