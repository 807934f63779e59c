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
from fasttrain.checkpoint.place import Place
from fasttrain.checkpoint.problems import Problem, combined
from fasttrain.checkpoint.read import Reader
from fasttrain.checkpoint.saved import OfReader, Plan, Saved
from fasttrain.checkpoint.stages import Held, elsewhere
from fasttrain.checkpoint.state import Mismatch
from fasttrain.dist.mesh import Mesh
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
         wire: Wire | None = None, verify: bool = True, mesh: Mesh | None = None) -> Loaded | None:
    """Load a checkpoint into models, optimizers and other objects, whatever number of ranks, stage and mesh wrote it.

    Everything that is to be read here is verified, and compared with what there is, before anything is changed.

    Arguments:
        directory: of all checkpoints.
        state: as `Checkpointer.save` takes it, or some entries of it. Plain values in it say only that they are wanted.
        which: "newest"; a step; or the path of one checkpoint, which may be its name in the directory.
        wire: to the other ranks, which load too and have the same; or
        mesh: of the training: those of a pipeline's stages have parts of the model.
        verify: compare what is read with its checksums.

    Returns:
        What was loaded; None if there is no checkpoint at all.

    Raises:
        Mismatch: it is of another model, optimizer or storage; what differs is listed, and nothing was changed.
        CheckpointError: those that there are cannot be used. With `which` "newest" one that is damaged is passed over,
            with a warning; if it was named, it raises.
    """
    return load_at(Place(wire, mesh), directory, state, which, verify)


def load_at(place: Place, directory: str | os.PathLike[str], state: Mapping[str, Any],
            which: str | int | os.PathLike[str], verify: bool) -> Loaded | None:
    """`load` of a process that knows its place."""
    if isinstance(which, bool) or not isinstance(which, str | os.PathLike | SupportsIndex):
        raise TypeError(f"which={which!r}: give 'newest', a step, or the path of one checkpoint")
    found = _candidates(Path(directory), which, place.wire)
    if found is None:
        return None
    known = Known(state, place)
    skipped: list[tuple[Path, str]] = []
    while found:
        for path, reason in found:
            if reason is None:
                tried = _Trial(path, known, verify)
                reason = agree(path, place.wire, tried.problems, tried.failure, tried.damage)
            if reason is None:
                return tried.apply(skipped)
            if which != "newest":
                raise CheckpointError(f"{path} cannot be used: {reason}")
            skipped.append((path, reason))
            if place.rank == 0:
                warnings.warn(f"{path} cannot be used, and is passed over for the one before it: {reason}",
                              stacklevel=3)
        before = {path for path, _ in skipped}  # who writes here may have saved others meanwhile, and removed these
        found = [one for one in _candidates(Path(directory), which, place.wire) or [] if one[0] not in before]
    raise CheckpointError(f"none of the {len(skipped)} checkpoints in {directory} can be used: move them away to begin "
                          f"anew. {'; '.join(reason for _, reason in skipped[:3])}")


class Known:
    """What is to be loaded into, as this rank and the other stages of its pipeline have it; a collective.

    Attributes:
        entered: the entries of the state.
        elsewhere: addresses that other stages hold.
        failure: why this rank does not know them.
    """

    def __init__(self, state: Mapping[str, Any], place: Place):
        self.entered: dict[str, whole.Entry] = {}
        self.failure: Exception | None = None
        here = Held({}, [])
        try:
            self.entered = whole.entries(state, place)
            if place.stages > 1:
                here = whole.held(self.entered)
        except Exception as error:  # told to all when a checkpoint is looked at
            self.failure = error
        self.elsewhere = elsewhere(place, here)

    def plans(self, saved: Saved) -> tuple[list[Plan], list[Problem]]:
        """How they would be loaded, and why they cannot be."""
        if self.failure is not None:
            raise self.failure
        return whole.plans(self.entered, saved, self.elsewhere)


class _Trial:
    """One checkpoint, looked at by this rank."""

    def __init__(self, path: Path, known: Known, verify: bool):
        self.path = path
        self.plans: list[Plan] = []
        self.damage: str | None = None
        self.problems: list[Problem] = []
        self.failure: Exception | None = None
        try:
            self.reader = Reader(path, verify)
            self.saved = Saved(OfReader(self.reader))
            self.plans, self.problems = known.plans(self.saved)
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


def agree(path: Path, wire: Wire | None, problems: list[Problem], failure: Exception | None = None,
          damage: str | None = None) -> str | None:
    """Why no rank may load it, the same on each; None if all may.

    Arguments:
        problems, failure, damage: those of this rank.

    Raises:
        Mismatch: of any rank.
        Exception: this rank's failure; RuntimeError: another one's.
    """
    mine: dict[str, Any] = {"damage": damage, "problems": problems,
                            "failure": None if failure is None else f"{type(failure).__name__}: {failure}"}
    told = [mine] if wire is None else [json.loads(text) for text in wire.gather_objects_json(json.dumps(mine))]
    if failure is not None:
        raise failure
    for rank, one in enumerate(told):
        if one["failure"]:
            raise RuntimeError(f"rank {rank} cannot load {path}: {one['failure']}")
    for one in told:
        if one["damage"]:
            return one["damage"]
    if lines := combined(one["problems"] for one in told):
        raise Mismatch(str(path), lines)
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
