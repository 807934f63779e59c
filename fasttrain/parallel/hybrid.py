"""Over which ranks of a mesh `fully_shard` cuts parameters, and over which it keeps copies of the parts.

Parameters are cut along "shard". Copies lie along "data", "expert" and "context"; an expert's weights, which differ
along "expert", have theirs along the other two. torch takes copies in one dimension: several axes become one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.parallel import held
from fasttrain.parallel.tensor import partial


def of(mesh: Mesh, *without: str) -> DeviceMesh:
    """The mesh of copies and shards for parameters of which the ranks along other axes hold other parts."""
    same = tuple(axis for axis in MEAN if axis not in ("shard", *without) and mesh.sizes[axis] > 1)
    shards = mesh["shard"]
    if not same:
        return shards
    copies = mesh[same[0]] if len(same) == 1 else mesh[same]._flatten("_".join(same))
    return DeviceMesh._concatenate([copies, shards])


def check(mesh: Mesh, model: nn.Module) -> None:
    """Raise ValueError for a model, or a mesh, that `fully_shard` would treat wrongly."""
    if mesh.sizes["shard"] == 1 and mesh.terms > 1:
        raise ValueError(f"the mesh has {mesh.terms} ranks that hold the same parameters and shard=1, along which they "
                         f"would be cut: make it with shard={mesh.terms} (copies of shards with less), or take "
                         "DataParallel, which keeps whole ones")
    for name, p in model.named_parameters():
        apart = held.cut(name, p)
        if other := [axis for axis in apart if axis not in ("tensor", "expert")]:
            raise ValueError(f"{name} is cut along {', '.join(other)} already: shard() cuts what is whole, or cut "
                             "along tensor or expert")
        if partial.declared(p) and not hasattr(p, "placements"):
            raise ValueError(f"the gradients of {name} are addends over the tensor axis, which fully_shard adds "
                             "up of DTensors only: distribute it over mesh['tensor'] as Replicate(), as "
                             "SequenceParallel does")


def experts(model: nn.Module) -> list[nn.Module]:
    """The modules with weights of experts, each of which becomes a unit of its own.

    Raises:
        ValueError: one has other parameters too, whose copies lie elsewhere.
    """
    found = []
    for name, part in model.named_modules():
        if not any("expert" in held.cut(one, p) for one, p in part.named_parameters(recurse=False)):
            continue
        if other := [one for one, p in part.named_parameters() if "expert" not in held.cut(one, p)]:
            raise ValueError(f"{name or 'the model'} has weights of experts and {other[0]}, which is none: a module's "
                             "parameters are gathered together, so put the experts' into a module of their own")
        found.append(part)
    return found


def together(parts: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Parts in groups of those that share a parameter (an embedding and the head that is tied to it, on one rank)."""
    groups: list[tuple[set[int], list[nn.Module]]] = []
    for part in parts:
        own = {id(p) for p in part.parameters()}
        members = [part]
        for group in [group for group in groups if group[0] & own]:
            groups.remove(group)
            own, members = own | group[0], group[1] + members
        groups.append((own, members))
    return [members for _, members in groups]


def alone(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The parts that a stage of a pipeline calls one after the other, instead of the model itself."""
    found: list[nn.Module] = []
    for part in model.children():
        if type(part).forward in (nn.Sequential.forward, nn.Module.forward):  # taken apart; a list, which nobody calls
            found += alone(part, blocks)
        elif part not in blocks and any(True for _ in part.parameters()):
            found.append(part)
    return found
