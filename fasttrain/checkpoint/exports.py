"""Checkpoints for others: safetensors weights, plain torch files, torch's distributed checkpoints.

All are made of the files of a checkpoint, of any number of ranks and any stage, in one process without the model: whole
tensors under the names of the original model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import encoding
from fasttrain.checkpoint.errors import NotACheckpoint
from fasttrain.checkpoint.find import newest
from fasttrain.checkpoint.read import Reader
from fasttrain.checkpoint.saved import OfReader, Saved, given, states_of
from fasttrain.checkpoint.together import told_of

Where = str | os.PathLike[str]


def export_safetensors(checkpoint: Where, path: Where, model: str = "model") -> None:
    """Write the weights of a model into one safetensors file, as the Hugging Face hub has them.

    Arguments:
        checkpoint: one checkpoint, or a directory of which the newest is taken.
        path: of the file to write. Tied weights are in it once, under their first name.
        model: the model's key in the state.

    Raises:
        NotACheckpoint: it has no such model.
    """
    from safetensors.torch import save_file

    with opened(checkpoint) as reader:
        weights, _ = _model(Saved(OfReader(reader)), model)
        save_file(weights, path, metadata={"format": "pt"})


def export_torch(checkpoint: Where, path: Where, model: str = "model", optimizer: str | None = "optimizer") -> None:
    """Write ``{"model": state dict, "optimizer": state dict}`` by `torch.save`, which `torch.load` reads with
    ``weights_only=True``.

    The optimizer's is that of an optimizer of the same class and options, which is not divided, with parameters counted
    in the order of its groups.

    Arguments:
        checkpoint: one checkpoint, or a directory of which the newest is taken.
        path: of the file to write.
        model, optimizer: their keys in the state; None leaves the optimizer out.

    Raises:
        NotACheckpoint: it has no such model or optimizer.
    """
    with opened(checkpoint) as reader:
        saved = Saved(OfReader(reader))
        found: dict[str, Any] = {"model": _with_ties(saved, model)}
        if optimizer is not None:
            states, groups, more = _optimizer(saved, optimizer)
            numbers = {name: number for number, name in enumerate(name for group in groups for name in group["names"])}
            found["optimizer"] = {
                **more, "state": {numbers[name]: state for name, state in states.items()},
                "param_groups": [{**group["options"], "param_names": group["names"],
                                  "params": [numbers[name] for name in group["names"]]} for group in groups]}
        torch.save(found, path)


def export_dcp(checkpoint: Where, path: Where, model: str = "model", optimizer: str | None = "optimizer") -> None:
    """Write a checkpoint of `torch.distributed.checkpoint` with the entries "model" and "optimizer".

    They have the names that `torch.distributed.checkpoint.state_dict` gives, so that `get_optimizer_state_dict`,
    `dcp.load` and `set_optimizer_state_dict` load it into any sharding.

    Arguments:
        checkpoint: one checkpoint, or a directory of which the newest is taken.
        path: of the directory to write.
        model, optimizer: their keys in the state; None leaves the optimizer out.

    Raises:
        NotACheckpoint: it has no such model or optimizer.
    """
    import torch.distributed.checkpoint as dcp

    with opened(checkpoint) as reader:
        saved = Saved(OfReader(reader))
        found: dict[str, Any] = {"model": _with_ties(saved, model)}
        if optimizer is not None:
            states, groups, more = _optimizer(saved, optimizer)
            found["optimizer"] = {**more, "state": states, "param_groups": [
                {**group["options"], "params": group["names"], "param_names": group["names"]} for group in groups]}
        dcp.save(found, checkpoint_id=path, no_dist=True)


def _with_ties(saved: Saved, model: str) -> dict[str, Any]:
    """The weights of a model, tied ones under all of their names."""
    weights, same = _model(saved, model)
    return weights | {other: weights[name] for other, name in same.items()}


def opened(checkpoint: Where) -> Reader:
    """A checkpoint, or the newest one of a directory.

    Raises:
        NotACheckpoint: it is neither.
    """
    path = Path(checkpoint)
    if not (path / "manifest.json").exists():
        if (found := newest(path)) is None:
            raise NotACheckpoint(f"{path} is no checkpoint, and no directory of complete ones")
        path = found.path
    return Reader(path)


def _told(saved: Saved, key: str, kind: str) -> Mapping[str, Any]:
    told = told_of(saved, key)
    if not isinstance(told, Mapping) or told.get("kind") != kind:
        there = [name for name, one in saved.source.values(0).get("entries", {}).items()
                 if isinstance(one, Mapping) and one.get("kind") == kind]
        raise NotACheckpoint(f"the checkpoint has no {kind} {key!r}; it has {', '.join(map(repr, there)) or 'none'}")
    return told


def _model(saved: Saved, key: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Weights by name, and other names of tied ones. What is no tensor of its state dict is left out."""
    told = _told(saved, key, "model")
    extra = {one["name"] for one in encoding.references(told.get("extra", {}))}
    names = [name for name in saved.names(key) if name not in extra]
    return {name.removeprefix(f"{key}/"): saved.read(name) for name in names}, told.get("same", {})


def _optimizer(saved: Saved, key: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """States by the names of parameters; the groups; what a state dict has beside them."""
    told = _told(saved, key, "optimizer")
    give = given(saved)
    trees = states_of(saved, key)
    groups = [{"names": group["names"], "options": encoding.decode(group["options"], give)} for group in told["groups"]]
    order = [name for group in groups for name in group["names"]]
    return ({name: encoding.decode(trees[name], give) for name in order if name in trees}, groups,
            encoding.decode(told.get("more", {}), give))

