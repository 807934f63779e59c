"""The Triton backend: needs no compiler on the user's machine; runs in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib.util
import linecache
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import (
    emit_triton,
    emit_triton_kept,
    emit_triton_stage,
    launches,
    place,
    resident,
    ring,
    table,
    triton_bits,
    triton_blocks,
    triton_codecs,
    triton_kept,
    triton_lanes,
)
from fasttrain.kernels.emit_cpp import digest
from fasttrain.kernels.item import STORAGES, Item, dense
from fasttrain.kernels.launches import Launches
from fasttrain.kernels.resident import Tables
from fasttrain.kernels.table import Kind
from fasttrain.rule import Rule

# Elements of a chunk in fp32 and in fp64: two 16-byte loads of each fp32 operand are in flight per thread. Left alone,
# ptxas spills a register or two of the rules with three states to reach 80 or 128.
BLOCK = {False: 1024, True: 512}
OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": False}
KEPT_OPTIONS = {**OPTIONS, "maxnreg": 255}  # those of items that are not plain take up to 220, and spill below that
BLOCK_INTERPRETED = 1 << 16  # the interpreter costs about 6 ms per program, whatever its size
OLDEST = (3, 6)


def why_not(device: torch.device) -> str | None:
    """Why Triton cannot step tensors on `device`. On the CPU it can, in its interpreter, which is very slow."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fasttrain[triton]')"
    version = importlib.import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}: install a newer one"
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"Triton does not run on {device.type}"
    return None


@cache
def compile_rule(rule: Rule, interpreted: bool, codecs: tuple[int, ...] = ()) -> Any:
    """The kernel of a rule, for the compiler or for the interpreter; of items that are not plain by their codecs."""
    functions = [*triton_codecs.FUNCTIONS]
    if codecs:
        functions += [*triton_bits.FUNCTIONS, *triton_kept.FUNCTIONS, *triton_blocks.FUNCTIONS]
    source = emit_triton_kept.kernel(rule, codecs) if codecs else emit_triton.kernel(rule)
    return printed(rule, source, wrapped(functions, interpreted), " ".join(map(str, codecs)))


@cache
def compile_stage(rule: Rule, interpreted: bool, together: int) -> Any:
    """The kernel of a stage with sums."""
    space = wrapped([*triton_codecs.FUNCTIONS, *triton_lanes.FUNCTIONS], interpreted)
    return printed(rule, emit_triton_stage.kernel(rule, together), space, f"stage {together}")


def wrapped(functions: Sequence[Any], interpreted: bool) -> dict[str, Any]:
    """Plain functions as Triton's, by name: for the compiler or for the interpreter. They call each other."""
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    jit = InterpretedFunction if interpreted else triton.jit
    space: dict[str, Any] = {"tl": tl, "jit": jit, "__name__": "fasttrain.generated"}
    if interpreted:
        space["range"] = range_interpreted
    for function in functions:
        # The wrapped copy looks its names up in this space, where Triton's language and the other copies are.
        copy = FunctionType(function.__code__, space, function.__name__)
        copy.__annotations__ = function.__annotations__
        space[function.__name__] = jit(copy)
    return space


def range_interpreted(*bounds: Any) -> range:
    """`range` of the interpreter's numbers, which NumPy keeps in arrays of shape (1,).

    Triton 3.6 makes an index of one by int(), which NumPy 2.4 refuses.
    """
    return range(*(bound.handle.data.item() if hasattr(bound, "handle") else bound for bound in bounds))


def printed(rule: Rule, source: str, space: dict[str, Any], kind: str) -> Any:
    """The function `step` of a printed rule. A user may give one name to two equations."""
    space["__name__"] += f".{rule.name}"
    file = f"<fasttrain rule {rule.name} {digest(rule):08X} {kind}>"
    # Triton reads a function's source through linecache; an entry without a modification time is never dropped.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), space)
    return space["step"]


def step(items: Sequence[Item]) -> None:
    """Step every item: one launch for each (rule, storages, device)."""
    with dense(items) as walkable:
        groups = table.grouped(walkable)
        starts = [ready(device, [(kind, group) for kind, group in groups.items() if kind.device == device])
                  for device in {kind.device: None for kind in groups}]
        for begin in starts:  # when nothing more takes memory
            begin()
        count_up(walkable)
        torch.autograd.graph.increment_version([tensor for item in walkable for tensor in item.written])


tables: Tables[Launches] = Tables()
place_of: Any = place.place_of  # torch's side of a device; tests put another in its place


def ready(device: torch.device, groups: Sequence[tuple[Kind, list[Item]]]) -> Callable[[], None]:
    """What starts one launch for each group, all on one device and on torch's current stream there."""
    here = place_of(device)
    with here.guard():
        made = launches.ready(tables, here, device, here.stream(), groups, partial(block_of, device), lambda kind: None)
    clips = [any(item.tail.clip != math.inf for item in items if not item.plain) for _, items in groups]
    return partial(start, groups, made, clips)


def start(groups: Sequence[tuple[Kind, list[Item]]], made: Launches, clips: Sequence[bool]) -> None:
    """One program for each chunk."""
    for index, ((kind, items), chunks, width) in enumerate(zip(groups, made.chunks, made.widths, strict=True)):
        if chunks:
            dtype = torch.float64 if items[0].dtype == torch.float64 else torch.float32
            rows = made.on_device.view("live", index, dtype)
            begin(kind, items, chunks, made.on_device.view("fixed", index, torch.int64), rows, width,
                  made.on_device.view("live", len(groups) + index, torch.int64), None,
                  clip=clips[index])


class Standing:
    """What `fasttrain.kernels.standing` takes of this backend."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.place = device, place_of(device)

    @staticmethod
    def takes(item: Item) -> bool:
        """Everything that is flat."""
        return True

    def chunk_of(self, items: Sequence[Item]) -> int:
        return block_of(self.device, items)

    def use(self, kind: Kind) -> None:
        """It is compiled when it is first started."""

    def start(self, groups: Sequence[tuple[Kind, list[Item]]], made: Launches, clips: Sequence[bool]) -> None:
        start(groups, made, clips)


def begin(kind: Kind, items: Sequence[Item], chunks: int, table_of: Tensor, rows: Tensor, width: int,
          gradients: Tensor, skip: Tensor | None, clip: bool) -> None:
    """Start the kernel of such items, over a table of chunks on the device."""
    interpreted, wide = kind.device.type == "cpu", items[0].dtype == torch.float64
    kernel = compile_rule(kind.rule, interpreted, kind.codecs)
    stated = {"clip": clip} if kind.codecs else {}
    options = {} if interpreted else KEPT_OPTIONS if kind.codecs else OPTIONS
    storages = () if kind.codecs else tuple(STORAGES[dtype] for dtype in kind.dtypes)
    with guard(kind.device):
        kernel[(chunks,)](table_of, rows, width, gradients, skip, *storages, **stated, wide=wide,
                          block=block_of(kind.device, items), interpreted=interpreted, **options)


def block_of(device: torch.device, items: Sequence[Item]) -> int:
    """Elements of a chunk."""
    return BLOCK_INTERPRETED if device.type == "cpu" else BLOCK[items[0].dtype == torch.float64]


def guard(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts a kernel on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(array: np.ndarray, device: torch.device, what: str = "the tables of a step") -> torch.Tensor:
    """A copy on the device, ordered on the current stream; the host does not wait. `what`: for the error where there is
    no memory for it.
    """
    tensor = torch.from_numpy(array)
    with resident.making(what, device):
        return ring.upload(place_of(device), array).view(tensor.dtype).view(tensor.shape)


def patched(kept: Tables[resident.Resident], key: tuple[Any, ...], array: np.ndarray, device: torch.device,
            what: str) -> torch.Tensor:
    """The same of a table that stays there (`resident.patched`)."""
    with resident.making(what, device):
        return resident.patched(kept, place_of(device), key, array)


def count_up(items: Sequence[Item]) -> None:
    """Add one to every step count."""
    for item in items:
        if item.counter is not None:
            item.counter.add_(1)


def compile_ahead(rule: Rule, kept: tuple[int, ...], wide: bool, arch: int) -> Any:
    """Compile a rule for a GPU that need not be here; `asm["cubin"]` and `asm["ptx"]` of the result are the code.

    Arguments:
        kept: the storages of p, g and the states, numbered as in `fasttrain.kernels.item.STORAGES`.
        wide: compute in float64.
        arch: 80, 90, 100, ...
    """
    function = compile_rule(rule, interpreted=False)
    stated = [name for name in function.arg_names if name.endswith("_storage")]
    return _compile_ahead(function, arch, OPTIONS, {**dict(zip(stated, kept, strict=True)), "wide": wide})


def compile_kept_ahead(rule: Rule, codecs: tuple[int, ...], clip: bool, arch: int) -> Any:
    """The same for items that are not plain, computed in float32, with or without clipping by value."""
    return _compile_ahead(compile_rule(rule, False, codecs), arch, KEPT_OPTIONS, {"wide": False, "clip": clip})


def _compile_ahead(function: Any, arch: int, options: dict[str, Any], values: dict[str, Any]) -> Any:
    wide = values["wide"]
    values = {**values, "block": BLOCK[wide], "interpreted": False}
    return compile_for(function, arch, options, {"table": "*i64", "rows": "*fp64" if wide else "*fp32", "width": "i32",
                                                "gradients": "*i64"}, {**values, "skip": None})


def compile_for(function: Any, arch: int, options: dict[str, Any], types: dict[str, str],
                values: dict[str, Any], multiples: Sequence[str] = ()) -> Any:
    """Compile a function for an architecture, given the types of its arguments and the values of its constants.

    `multiples`: integer arguments that are multiples of 16, for which Triton compiles a version of its own.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    aligned: Any = [["tt.divisibility", 16]]  # as for every tensor of torch that is passed as an argument
    source = ASTSource(function, dict.fromkeys(names, "constexpr") | types,
                       {(names.index(name),): value for name, value in values.items()},
                       {(names.index(name),): aligned for name, kind in types.items()
                        if kind.startswith("*") or name in multiples})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
