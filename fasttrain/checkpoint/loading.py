"""Loading: the newest checkpoint that is whole, the same on every rank, and nothing changed where it does not fit."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

from fasttrain.checkpoint import state as whole
from fasttrain.checkpoint.errors import CheckpointError, NotACheckpoint
from fasttrain.checkpoint.find import Found, complete
from fasttrain.checkpoint.parts import Among
from fasttrain.checkpoint.read import Reader
from fasttrain.checkpoint.saved import OfReader, Plan, Saved
from fasttrain.checkpoint.state import Mismatch
from fasttrain.dist.wire import Wire


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        path, step, sequence, world, metrics: of the checkpoint, as in `Found`.
        values: the plain values of the state (configuration, positions) by their keys.
        skipped: checkpoints that are newer and cannot be used, each with the reason.
        bytes_read: of tensors, by this rank.
    """

    path: Path
    step: int
    sequence: int
    world: int
    metrics: Mapping[str, float]
    values: Mapping[str, Any]
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    bytes_read: int = 0


def load(directory: str | os.PathLike[str], state: Mapping[str, Any], which: str | int | os.PathLike[str] = "newest",
         wire: Wire | None = None, verify: bool = True) -> Loaded | None:
    """Load a checkpoint into models, optimizers and other objects, whatever number of ranks and stage wrote it.

    Everything that is to be read here is verified, and compared with what there is, before anything is changed.

    Arguments:
        directory: of all checkpoints.
        state: as `Checkpointer.save` takes it, or some entries of it. Plain values in it say only that they are wanted.
        which: "newest"; a step; or the path of one checkpoint, which may be its name in the directory.
        wire: to the other ranks, which load too.
        verify: compare what is read with its checksums.

    Returns:
        What was loaded; None if there is no checkpoint at all.

    Raises:
        Mismatch: it is of another model, optimizer or storage; what differs is listed, and nothing was changed.
        CheckpointError: those that there are cannot be used. With `which` "newest" one that is damaged is passed over,
            with a warning; if it was named, it raises.
    """
    if isinstance(which, bool) or not isinstance(which, str | os.PathLike | SupportsIndex):
        raise TypeError(f"which={which!r}: give 'newest', a step, or the path of one checkpoint")
    rank, everyone = (0, Among(0, 1)) if wire is None else (wire.rank, Among(wire.rank, wire.size))
    found = _candidates(Path(directory), which, wire)
    if found is None:
        return None
    skipped: list[tuple[Path, str]] = []
    while found:
        for path, reason in found:
            if reason is None:
                tried = _Trial(path, state, rank, everyone, verify)
                reason = _agree(tried, wire)
            if reason is None:
                return tried.apply(skipped)
            if which != "newest":
                raise CheckpointError(f"{path} cannot be used: {reason}")
            skipped.append((path, reason))
            if rank == 0:
                warnings.warn(f"{path} cannot be used, and is passed over for the one before it: {reason}",
                              stacklevel=3)
        before = {path for path, _ in skipped}  # who writes here may have saved others meanwhile, and removed these
        found = [one for one in _candidates(Path(directory), which, wire) or [] if one[0] not in before]
    raise CheckpointError(f"none of the {len(skipped)} checkpoints in {directory} can be used: move them away to begin "
                          f"anew. {'; '.join(reason for _, reason in skipped[:3])}")


class _Trial:
    """One checkpoint, looked at by this rank."""

    def __init__(self, path: Path, state: Mapping[str, Any], rank: int, everyone: Among, verify: bool):
        self.path = path
        self.plans: list[Plan] = []
        self.damage: str | None = None
        self.problems: list[str] = []
        self.failure: Exception | None = None
        try:
            self.reader = Reader(path, verify)
            self.saved = Saved(OfReader(self.reader))
            self.plans, self.problems = whole.plans(state, self.saved, rank, everyone)
            if not self.problems:
                self.saved.source.verify([read for plan in self.plans for read in plan.reads])
        except (CheckpointError, OSError) as error:
            self.damage = str(error)
        except Exception as error:
            self.failure = error

    def apply(self, skipped: list[tuple[Path, str]]) -> Loaded:
        with self.reader as reader:
            for plan in self.plans:
                plan.apply()
            values = whole.values(self.saved)
            return Loaded(self.path, reader.step, reader.sequence, reader.world, reader.metrics, values, skipped,
                          self.saved.bytes_read)


def _agree(tried: _Trial, wire: Wire | None) -> str | None:
    """Why no rank may load it, the same on each; None if all may.

    Raises:
        Mismatch: of any rank.
    """
    mine: dict[str, Any] = {"damage": tried.damage, "problems": tried.problems,
            "failure": None if tried.failure is None else f"{type(tried.failure).__name__}: {tried.failure}"}
    told = [mine] if wire is None else [json.loads(text) for text in wire.gather_objects_json(json.dumps(mine))]
    if tried.failure is not None:
        raise tried.failure
    for rank, one in enumerate(told):
        if one["failure"]:
            raise RuntimeError(f"rank {rank} cannot load {tried.path}: {one['failure']}")
    for one in told:
        if one["damage"]:
            return one["damage"]
    if problems := list(dict.fromkeys(line for one in told for line in one["problems"])):
        raise Mismatch(str(tried.path), problems)
    return None


def _candidates(directory: Path, which: str | int | os.PathLike[str],
                wire: Wire | None) -> list[tuple[Path, str | None]] | None:
    """The checkpoints to try, as the first rank finds them; None if there are none."""
    found: list[tuple[str, str | None]] = []
    error = None
    if wire is None or wire.rank == 0:
        try:
            found = [(str(path), reason) for path, reason in _named(directory, which)]
        except (CheckpointError, OSError) as caught:
            error = str(caught)
    if wire is not None:
        found, error = json.loads(wire.gather_objects_json(json.dumps([found, error]))[0])
    if error is not None:
        raise NotACheckpoint(error)
    return [(Path(path), reason) for path, reason in found] or None


def _named(directory: Path, which: str | int | os.PathLike[str]) -> list[tuple[Path, str | None]]:
    if isinstance(which, os.PathLike) or (isinstance(which, str) and which != "newest"):
        for path in (Path(which), directory / which):
            if path.exists():
                return [(path, None)]
        raise NotACheckpoint(f"which={which!r} is neither 'newest' nor a path that exists, here or in {directory}; a "
                             "step is given as a number")
    all_of_them: list[Found] = complete(directory)
    if which == "newest":
        return [(one.path, one.reason) for one in all_of_them]
    chosen = [one for one in all_of_them if one.step == which and one.reason is None]
    if not chosen:
        steps = sorted({one.step for one in all_of_them if one.reason is None})
        raise NotACheckpoint(f"{directory} has no usable checkpoint of step {which}; it has those of steps {steps}")
    return [(chosen[0].path, None)]
