"""What a DTensor of logits, or of a weight, has here: which classes, and how the ranks that divide them speak."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from fasttrain.dist.along import Along
    from fasttrain.dist.wire import Wire


def is_dtensor(tensor: Any) -> bool:
    """Whether it has placements: DTensor takes long to import, and may not have been."""
    return hasattr(tensor, "placements")


class Classes(NamedTuple):
    """The classes of one rank among those that divide them.

    Attributes:
        local: this rank's columns (or rows of a weight). Its derivative goes back into the DTensor, placed as that.
        first: the class of the first.
        vocabulary: classes on all ranks.
        along: the ranks; None if each has all classes.
    """

    local: Tensor
    first: int
    vocabulary: int
    along: Along | None


def classes_of(tensor: Any, dim: int, name: str, wire: Wire | None = None) -> Classes:
    """A DTensor's local classes, by its own rule: ``ceil(V / ranks)`` for each rank, what is left for the last ones.

    Arguments:
        tensor: Replicate, or Shard(dim) over one dimension of its mesh and Replicate over others.
        dim: that of the classes.
        wire: over the ranks that divide them; None for the mesh's own group.

    Raises:
        ValueError: it is placed otherwise, or the local part is not what its placement says.
    """
    from fasttrain.dist.along import Along

    at = dim % tensor.ndim
    cuts = [index for index, each in enumerate(tensor.placements) if not each.is_replicate()]
    vocabulary = tensor.shape[at]
    if not cuts:
        return Classes(tensor.to_local(), 0, vocabulary, None)
    if len(cuts) > 1 or not (tensor.placements[cuts[0]].is_shard(at) or tensor.placements[cuts[0]].is_shard(dim)):
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} are a DTensor placed {tuple(tensor.placements)}: its "
                         f"classes, dimension {at}, may be divided over one dimension of the mesh, or every rank may "
                         f"have all; call {name}.redistribute(...) to Shard({dim}) or Replicate(), or give each "
                         f"rank's own rows, {name}.to_local()")
    along = Along(tensor.device_mesh, cuts[0], wire)
    each = -(-vocabulary // along.size)
    first = min(each * along.rank, vocabulary)
    local, wanted = tensor.to_local(), min(each, vocabulary - first)
    if local.shape[at] != wanted:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} have {local.shape[at]} of {vocabulary} classes on "
                         f"rank {along.rank} of {along.size}, and {tuple(tensor.placements)} puts {wanted} there: make "
                         "the DTensor with its true shape, DTensor.from_local(..., shape=..., stride=...)")
    return Classes(local, first, vocabulary, along)


def local_targets(targets: Any) -> Tensor:
    """Targets that every rank has, as a plain tensor.

    Raises:
        ValueError: they are a DTensor, and divided.
    """
    if not is_dtensor(targets):
        return targets
    if not all(placement.is_replicate() for placement in targets.placements):
        raise ValueError(f"targets are a DTensor placed {tuple(targets.placements)}: every rank needs all of them "
                         "here, targets.full_tensor()")
    return targets.to_local()


def rows_cut(hidden: Any, weight: Any, along: Along | None) -> tuple[int | None, Tensor]:
    """(the dimension of hidden that is cut over the ranks which divide the classes, or None; what is here).

    Raises:
        ValueError: it is cut along its features, over other ranks, or is an addend.
    """
    if not is_dtensor(hidden):
        return None, hidden
    cuts = [(dim, each) for dim, each in enumerate(hidden.placements) if not each.is_replicate()]
    if not cuts:
        return None, hidden.to_local()
    own = [dim for dim, each in enumerate(weight.placements) if not each.is_replicate()]
    (at, placement), *more = cuts
    dim = getattr(placement, "dim", -1) % hidden.ndim
    if (more or along is None or not placement.is_shard() or own != [at] or hidden.device_mesh != weight.device_mesh
            or dim == hidden.ndim - 1):
        raise ValueError(f"hidden of shape {tuple(hidden.shape)} is placed {tuple(hidden.placements)} and the weight "
                         f"{tuple(weight.placements)}: hidden is Replicate, or Shard of any but its last dimension "
                         "over the ranks that divide the classes; redistribute it")
    return dim, hidden.to_local()
