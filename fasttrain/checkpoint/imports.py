"""State that other packages saved: plain torch files, torch's distributed checkpoints. Nothing of them is executed."""

from __future__ import annotations

import collections
import io
import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.checkpoint import encoding
from fasttrain.checkpoint import state as whole
from fasttrain.checkpoint.loading import Known, agree
from fasttrain.checkpoint.names import Named, strip
from fasttrain.checkpoint.of_model import EXTRA, OfModel
from fasttrain.checkpoint.of_optimizer import OWN
from fasttrain.checkpoint.parts import ALONE, tensor_of
from fasttrain.checkpoint.place import Place
from fasttrain.checkpoint.problems import Problem
from fasttrain.checkpoint.saved import OfTensors, Plan, Saved
from fasttrain.checkpoint.state import Mismatch
from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire


def load_torch(path: str | os.PathLike[str], state: Mapping[str, Any], wire: Wire | None = None,
               mesh: Mesh | None = None) -> None:
    """Load a file of `torch.save` into models, optimizers and other objects, sharded or not.

    Arguments:
        path: of a dict of state dicts by the keys of `state`; or of one model's state dict, if `state` is of one model.
            It is read with ``weights_only=True``, and mapped, so that each rank reads what it needs.
        state: as `Checkpointer.save` takes it. States of optimizers belong to parameters by the names in the file's
            groups where it has names (`param_names`), else by their places, which a pipeline's stage does not have.
        wire: to the other ranks, which have the same; or
        mesh: of the training.

    Raises:
        Mismatch: it is of another model or optimizer; what differs is listed, and nothing was changed.
        pickle.UnpicklingError: it holds more than tensors and plain values.

    Example:
        >>> import tempfile, torch
        >>> from fasttrain.checkpoint import load_torch
        >>> from fasttrain.parallel import DataParallel
        >>> old, new = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({f"module.{name}": value for name, value in old.state_dict().items()}, file.name)
        ...     load_torch(file.name, {"model": new})
        >>> torch.equal(old.weight, new.weight)
        True
    """
    tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tree, Mapping):
        raise Mismatch(str(path), [f"it is a {type(tree).__name__}, not a dict of state dicts"])
    if tree and len(state) == 1 and all(isinstance(value, Tensor) for value in tree.values()):
        tree = {next(iter(state)): tree}
    _load(str(path), tree, state, Place(wire, mesh))


def import_dcp(path: str | os.PathLike[str], state: Mapping[str, Any], wire: Wire | None = None,
               mesh: Mesh | None = None) -> None:
    """Load a checkpoint of `torch.distributed.checkpoint` into models, optimizers and other objects, sharded or not.

    Every rank reads all of it. torch itself unpickles its metadata and values; here only what torch's own classes for
    them need is let in.

    Arguments:
        path: of its directory, with state dicts under the keys of `state`; of optimizers as
            `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives them, flattened or not.
        state: as `Checkpointer.save` takes it.
        wire: to the other ranks, which have the same; or
        mesh: of the training.

    Raises:
        Mismatch: it is of another model or optimizer; what differs is listed, and nothing was changed.
        pickle.UnpicklingError: it holds more than tensors and plain values.
    """
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    tree: dict[str, Any] = {}
    reader, planner = _safe()
    _load_state_dict(tree, reader(path), planner=planner(), no_dist=True)
    _load(str(path), tree, state, Place(wire, mesh))


def _load(path: str, tree: Mapping[str, Any], state: Mapping[str, Any], place: Place) -> None:
    if missing := [key for key in state if key not in tree]:
        raise Mismatch(path, [f"it has no {key!r}; it has {', '.join(map(repr, list(tree)[:20]))}" for key in missing])
    known = Known(state, place)
    plans, problems, failure = list[Plan](), list[Problem](), None
    try:
        plans, problems = known.plans(Saved(_source(tree, state)))
    except Exception as error:  # raised by `agree`
        failure = error
    agree(pathlib.Path(path), place.wire if place.stages > 1 else None, problems, failure)
    for plan in plans:
        plan.apply()


def _source(tree: Mapping[str, Any], state: Mapping[str, Any]) -> OfTensors:
    """State dicts as entries of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}

    def taker(prefix: str) -> encoding.Take:
        def take(path: str, value: Any) -> Mapping[str, Any]:
            tensors[f"{prefix}/{path}"] = tensor_of(f"{prefix}/{path}", value)
            return {"name": f"{prefix}/{path}"}
        return take

    named = Named({key: value for key, value in state.items() if isinstance(value, nn.Module)})
    for key, value in state.items():
        if isinstance(value, nn.Module):
            entries[key] = _model(key, tree[key], value, tensors, taker)
        elif isinstance(value, torch.optim.Optimizer):
            entries[key] = _optimizer(key, tree[key], value, named.of(value, key), tensors, taker)
        else:
            kind = "object" if whole.is_object(value) else "value"
            entries[key] = {"kind": kind, {"object": "state", "value": "value"}[kind]: encoding.encode(
                tree[key], taker(key))}
    return OfTensors(tensors, entries)


def _model(key: str, given: Mapping[str, Any], model: nn.Module, tensors: dict[str, Tensor], taker: Any) -> Any:
    """The entry of a model's state dict. What is tied in the model and equal in the file is one tensor in it."""
    clean = {strip(raw): value for raw, value in given.items()}
    found = {name: value for name, value in clean.items()
             if isinstance(value, Tensor) and name.rpartition(".")[2] != EXTRA}
    same: dict[str, str] = {}
    for other, name in OfModel(key, model, ALONE).ties().items():
        if other in found and name in found and found[other].dtype == found[name].dtype and torch.equal(
                found[other], found[name]):
            same[other] = name
    tensors |= {f"{key}/{name}": value for name, value in found.items() if name not in same}
    rest = {name: value for name, value in clean.items() if name not in found}
    return {"kind": "model", "same": same, "extra": encoding.encode(rest, taker(key))}


def _optimizer(key: str, given: Mapping[str, Any], optimizer: Any, names: Mapping[int, str], tensors: dict[str, Tensor],
               taker: Any) -> Any:
    """The entry of an optimizer's state dict, whose parameters are told by number or by name."""
    places = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    groups: list[dict[str, Any]] = []
    called: dict[Any, str] = {}
    for index, group in enumerate(given["param_groups"]):
        params = group["params"]
        if all(isinstance(one, str) for one in params):
            own = [strip(one) for one in params]
        elif group.get("param_names"):
            own = [strip(one) for one in group["param_names"]]
        elif index < len(places) and len(places[index]) == len(params):
            own = places[index]
        else:
            own = [f"parameter {one}" for one in params]  # which no optimizer has: the mismatch will be told
        called |= dict(zip(params, own, strict=True))
        groups.append({"names": own, "options": encoding.encode(
            {name: value for name, value in group.items() if name not in OWN}, taker(f"{key}/groups/{index}"))})
    shapes = {names[id(p)]: p.shape for group in optimizer.param_groups for p in group["params"]}
    states = {}
    for number, state in given["state"].items():
        name = called.get(number, str(number))

        def take(path: str, value: Tensor, name: str = name) -> Mapping[str, Any]:
            address = f"{key}/{name}/{path}"
            tensors[address] = value
            return {"name": address, **({"like": True} if value.dim() and value.shape == shapes.get(name) else {})}

        states[name] = encoding.encode(dict(state), take)
    more = {name: value for name, value in given.items() if name not in ("state", "param_groups")}
    kind = type(getattr(optimizer, "inner", optimizer)).__name__
    return {"kind": "optimizer", "class": kind, "state": states, "groups": groups,
            "more": encoding.encode(more, taker(f"{key}/more"))}


# --- torch's distributed checkpoints ----------------------------------------------------------------------------------

def _safe() -> tuple[Any, Any]:
    """torch's reader and planner, which unpickle nothing but what they need themselves."""
    from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata
    from torch.distributed.checkpoint._nested_dict import set_element
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner

    known = {(module.__name__, name): getattr(module, name) for module, names in (
        (metadata, ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                    "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
        (filesystem, ("_StorageInfo", "_StoragePrefix")), (torch, ("Size", "device")),
        (torch.serialization, ("_get_layout",)), (pathlib, ("PosixPath", "Path")),
        (collections, ("OrderedDict",))) for name in names if hasattr(module, name)}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
                return found
            if (module, name) not in known:
                raise pickle.UnpicklingError(f"the metadata names {module}.{name}, which is none of torch's classes "
                                             "for them: it is not loaded")
            return known[module, name]

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
                found = Unpickler(io.BytesIO(file.read())).load()
            found.storage_meta = found.storage_meta or metadata.StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    class Planner(_EmptyStateDictLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn],
                        torch.load(value, weights_only=True))

    return Reader, Planner
