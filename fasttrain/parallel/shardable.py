"""What can be sharded, over what, and that the ranks agree on it: the questions that `shard` asks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fasttrain.dist.fingerprint import agree, fingerprint
from fasttrain.dist.layout import Entry, FlatLayout
from fasttrain.dist.wire import Wire
from fasttrain.optim.local import is_dtensor, local
from fasttrain.parallel import reduced
from fasttrain.parallel.data import DataParallel

LISTS = (nn.ModuleList, nn.Sequential)
TRAVELS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REFUSED = {
    "int8": "codes of 8 bits need what they lacked in the last step, for the whole gradient on every rank",
    "ordered": "the order in which gradients are added is the backend's, and their cuts are fully_shard's",
    "hook": "fully_shard has no comm hooks",
}


def check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError for what is wrapped or sharded already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard() takes a model, not a {type(model).__name__}")
    if isinstance(model, (DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"the model is wrapped in {type(model).__name__}, which keeps a whole one on every rank: shard "
                        "the bare module instead")
    if inside := [name or "the model" for name, part in model.named_modules() if isinstance(part, FSDPModule)]:
        raise ValueError(f"{inside[0]} is sharded already: call shard() once, on the whole model, and name its blocks")


def blocks_of(model: nn.Module, blocks: str | Sequence[nn.Module] | None) -> list[nn.Module]:
    """The blocks that were named, or found, those within others first.

    Raises:
        ValueError: there is none of this name, or one is not within the model.
    """
    names = {part: name for name, part in model.named_modules()}
    lists: dict[str, Any] = {name: part for part, name in names.items() if isinstance(part, LISTS) and name}
    if blocks is None:
        own: list[Any] = [part for part in lists.values() if isinstance(part, nn.ModuleList) and len(part)]
        own.sort(key=lambda part: sum(p.numel() for p in part.parameters()))
        chosen = [part for part in own[-1] if part is not None] if own else []
    elif isinstance(blocks, str):
        if blocks not in lists:
            raise ValueError(f"blocks={blocks!r} names no ModuleList or Sequential within the model: it has "
                             f"{', '.join(lists) or 'none'}; or give the modules themselves")
        chosen = [part for part in lists[blocks] if part is not None]  # a stage of a pipeline may have dropped some
    else:
        chosen = list(dict.fromkeys(blocks))
    for part in chosen:
        if part not in names or part is model:
            raise ValueError(f"the block {type(part).__name__} is "
                             f"{'the model itself' if part is model else 'not within the model'}: give modules of it")
    return sorted(chosen, key=lambda part: -names[part].count("."))


def reduce_dtype_of(wire: Any, reduce_dtype: torch.dtype | None) -> torch.dtype | None:
    """In which dtype gradients travel.

    Raises:
        ValueError: in a way that `fully_shard` does not know, or in two.
        TypeError: not in floating-point numbers.
    """
    if reduce_dtype is not None and reduce_dtype not in TRAVELS:
        raise TypeError(f"reduce_dtype is {reduce_dtype}: gradients are added in {', '.join(map(str, TRAVELS))}")
    if wire == "same":
        return reduce_dtype
    if wire == "bf16":
        if reduce_dtype not in (None, torch.bfloat16):
            raise ValueError(f"wire='bf16' and reduce_dtype={reduce_dtype} contradict each other: give one of them")
        return torch.bfloat16
    name = getattr(wire, "name", wire)
    raise ValueError(f"wire={name!r} does not go with fully_shard: {REFUSED.get(name, 'it reduces by itself')}. Take "
                     "reduce_dtype=torch.bfloat16 for half the bytes, or DataParallel, which has every wire")


def device_of(model: nn.Module, mesh: Any) -> torch.device:
    """Where gradients are reduced.

    Raises:
        ValueError: the mesh has no dimension for it.
        TypeError: it is no mesh.
    """
    if mesh is None:
        kind = next((p.device.type for p in model.parameters() if p.device.type != "meta"), "cpu")
    elif not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is a {type(mesh).__name__}: fully_shard takes a DeviceMesh, made by "
                        "torch.distributed.device_mesh.init_device_mesh, or None for all ranks")
    elif mesh.ndim > 2:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions ({mesh.mesh_dim_names}): parameters are sharded along "
                         "one, or copied along the first of two; give mesh[name]")
    elif mesh.ndim == 2 and not mesh.mesh_dim_names:
        raise ValueError("a mesh of copies and shards needs names of its two dimensions: give mesh_dim_names to "
                         "init_device_mesh")
    else:
        kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def mesh_of(mesh: DeviceMesh | None, device: torch.device) -> DeviceMesh:
    """The mesh that was given, or one of all ranks."""
    if mesh is not None:
        return mesh
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialized: call init_process_group, under torchrun, or give a "
                           "mesh")
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))


def agreed(wire: Wire, model: nn.Module, blocks: Sequence[nn.Module],
           options: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The parameters that are trained, with their names, alike on all ranks.

    Raises:
        DisagreementError: they are not.
        TypeError, ValueError, RuntimeError: as `fasttrain.parallel.reduced.trained`.
    """
    cut = [(name, p) for name, p in model.named_parameters() if is_dtensor(p) and p.requires_grad]
    plain = [(name, p) for name, p in model.named_parameters() if not is_dtensor(p)]
    named = [*cut, *(reduced.trained(plain) if plain or not cut else [])]
    entries = [Entry(name, tuple(p.shape), p.dtype, local(p).device.type, "data", p.stride(), p.requires_grad)
               for name, p in named]
    placed = {name: str(p.placements) for name, p in named if isinstance(p, DTensor)}
    names = {part: name for name, part in model.named_modules()}
    agree(wire, fingerprint(entries, FlatLayout.of(entries, wire.size),
                            {**options, "placed": placed, "blocks": [names[part] for part in blocks]}))
    return named


@torch.no_grad()
def make_equal(wire: Wire, model: nn.Module) -> None:
    """Give every rank the first one's parameters and buffers, one after the other: a whole model needs no copy."""
    for tensor in (*model.parameters(), *model.buffers()):
        mine = local(tensor.detach())
        if mine.is_meta or wire.size == 1:
            continue
        if mine.is_contiguous():
            wire.broadcast_(mine)
        else:
            mine.copy_(wire.broadcast_(mine.contiguous()))
