"""The checkpoints of a run: saved beside the training, kept, and loaded."""

from __future__ import annotations

import json
import operator
import os
import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import torch

from fasttrain import __version__
from fasttrain.checkpoint import loading
from fasttrain.checkpoint import state as whole
from fasttrain.checkpoint.commit import checked, publish
from fasttrain.checkpoint.errors import CheckpointError
from fasttrain.checkpoint.loading import Loaded
from fasttrain.checkpoint.lock import Lock
from fasttrain.checkpoint.parts import Part
from fasttrain.checkpoint.place import Place
from fasttrain.checkpoint.removal import clean, prune
from fasttrain.checkpoint.retention import Keep
from fasttrain.checkpoint.saving import Saving
from fasttrain.checkpoint.space import preflight
from fasttrain.checkpoint.stages import Held, Writers
from fasttrain.checkpoint.staging import Staged, Staging, live
from fasttrain.checkpoint.write import write_rank
from fasttrain.checkpoint.writer import Writer
from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire

Record = dict[str, Any]
ROOM = 1 << 20  # bytes of manifests and headers, to be free beside the tensors


class Checkpointer:
    """Saves the state of a run and loads it.

    `save` copies the state into memory of the host that it keeps, and returns; a thread hashes and writes the copy. So
    what is saved is the state at the call. Each rank writes its part, tensors that several hold divided among them; the
    first one makes them one checkpoint when all are durable, and then removes old ones. Nothing is said between ranks
    but at construction; only the stages of a pipeline say in `save` which names they hold, when these have changed. See
    docs/checkpoints.md.

    Arguments:
        directory: of this run's checkpoints; one process writes into it.
        keep: which checkpoints stay; a number: that many of the newest.
        every: steps between saves, for `due`; None: never.
        wire: to the other ranks, all of which make one, and hold the same plain tensors; or
        mesh: of the training, a `fasttrain.parallel.Mesh`: plain tensors are held by the ranks of this one's pipeline
            stage, and what is cut along an axis by all that differ along others. Neither: there is one process.
        staging: "memory": as above. "none": write at once, from where the tensors lie, and return when all is durable.
        when_busy: what `save` does while one is being written: "wait" for it, or "skip" this one, which is counted.
            To skip, several ranks ask one another in `save` (a message of 8 bytes).
        deadline_s: how long the first rank waits for the others' parts.
        nice: added to the writing thread's niceness, so that training goes first; 0: writing is as fast as it can be.
        record: called in the thread of `save`, `check` and `close` with what was done: ``{"event": "checkpoint",
            "step", "bytes", "stall_s", "staging_bytes"}`` when a save began (`staging_bytes`: memory that is kept from
            now on), ``{"event": "checkpoint written", "step", "seconds", "path", "removed"}`` when it was durable.

    Attributes:
        skipped: saves that were skipped.
        cleaned: what an earlier process had left unfinished, and was removed.

    Raises:
        Locked: another process writes into the directory.
        ValueError, TypeError: an option is wrong, or the ranks give different ones; the same on every rank.

    Example:
        >>> import tempfile
        >>> from fasttrain.checkpoint import Checkpointer
        >>> from fasttrain.optim import AdamW
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = AdamW(model.parameters())
        >>> state = {"model": model, "optimizer": optimizer, "config": {"lr": 1e-3}}
        >>> with tempfile.TemporaryDirectory() as folder, Checkpointer(folder, every=100) as checkpoints:
        ...     loaded = checkpoints.load(state)  # None: there is none yet
        ...     if checkpoints.due(100):
        ...         saving = checkpoints.save(100, state)
        ...     path = saving.wait()
        ...     print(loaded, path.name, checkpoints.load(state).values)
        None step-000000000100 {'config': {'lr': 0.001}}
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: Keep | int | None = None, every: int | None = None,
                 wire: Wire | None = None, mesh: Mesh | None = None, staging: str = "memory", when_busy: str = "wait",
                 deadline_s: float = 600.0, nice: int = 19, record: Callable[[Record], None] | None = None):
        for name, value, known in (("staging", staging, ("memory", "none")),
                                   ("when_busy", when_busy, ("wait", "skip"))):
            if value not in known:
                raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, known))}")
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every={every!r} must be a positive number of steps, or None")
        if not isinstance(keep, Keep | SupportsIndex | None) or isinstance(keep, bool):
            raise TypeError(f"keep={keep!r} must be a Keep(...), a number of checkpoints, or None")
        self.directory, self.every, self.when_busy = Path(directory).absolute(), every, when_busy
        self.keep = keep if isinstance(keep, Keep) else Keep() if keep is None else Keep(last=operator.index(keep))
        self.deadline_s, self.mesh = deadline_s, mesh
        self._place = Place(wire, mesh)
        self._writers = Writers(self._place)
        self.wire, self.rank, self.size = self._place.wire, self._place.rank, self._place.size
        self.skipped, self.cleaned = 0, list[Path]()
        self._record = record or _nothing
        self._staging = Staging() if staging == "memory" else None
        self._writer = Writer(min(19, max(0, os.nice(0)) + nice) if nice else 0)
        self._saves, self._ended = 0, list[Record]()
        self._lock: Lock | None = None
        self._closed = False
        self._token = self._meet()

    def _meet(self) -> str:
        """Lock, clean up, and agree on the name of this run's unfinished saves; the only meeting of the ranks."""
        told: dict[str, Any] = {"directory": str(self.directory), "every": self.every,
                                "keep": str(self.keep), "when_busy": self.when_busy,
                                "staging": self._staging is not None, "version": __version__, "mesh": repr(self.mesh)}
        error: Exception | None = None
        if self.rank == 0:
            told["token"] = secrets.token_hex(4)
            try:
                self._lock = Lock(self.directory)
                self.cleaned = clean(self._lock)
            except (CheckpointError, OSError) as caught:
                error = caught
                told["error"] = str(caught)
        everyone = [told] if self.wire is None else [
            json.loads(text) for text in self.wire.gather_objects_json(json.dumps(told))]
        if error is not None:
            raise error
        if "error" in everyone[0]:
            raise CheckpointError(everyone[0]["error"])
        for name in ("directory", "every", "keep", "when_busy", "staging", "version", "mesh"):
            if len(values := {str(one[name]) for one in everyone}) > 1:
                if self._lock is not None:
                    self._lock.release()
                raise ValueError(f"the ranks give different checkpointers: {name} is {' and '.join(sorted(values))}")
        if self.cleaned:
            warnings.warn(f"{self.directory}: removed what an earlier run had left unfinished: "
                          f"{', '.join(path.name for path in self.cleaned)}", stacklevel=3)
        return everyone[0]["token"]

    # --- Saving -------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether a save belongs after this step, counted from 1."""
        return self.every is not None and step > 0 and step % self.every == 0

    def save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> Saving:
        """Save a state; every rank calls it, after the same step.

        Arguments:
            step: how many steps were made.
            state: by keys of your choice: models, optimizers (a `Zero` too), objects with `state_dict` and
                `load_state_dict` (schedules, loss scalers, loaders), `Rng()`, and plain values: numbers, texts, lists,
                dicts, tensors. Parameters of optimizers that were given no names have them from the models.
            metrics: what `keep` may choose by, on the first rank.

        Returns:
            The save under way.

        Raises:
            TypeError, ValueError: something cannot be saved; it is named, and nothing was written.
            NoSpace: the disk has too little space for it, which was seen before the first save.
            Exception: the save before failed, and nobody was told yet; this one was not begun.
        """
        begun = time.perf_counter()
        if self._closed:
            raise RuntimeError("this Checkpointer is closed: make a new one")
        if self._lock is not None and not self._lock.held:
            raise RuntimeError(f"{self.directory} is locked by the process that made this Checkpointer, of which this "
                               "is a fork: save there, or make one for another directory here")
        step, metrics = checked(step, metrics)
        self.check()
        if self.when_busy == "skip" and self._busy_anywhere():
            self.skipped += 1
            return Saving(step, skipped=True)
        self._writer.wait()
        self.check()
        parts, values = self._out(state)
        saving = Saving(step, sum(part.nbytes for part in parts))
        if self._saves == 0:
            preflight(self.directory, saving.nbytes + ROOM)
        self._saves += 1
        folder = self.directory / f".part-{step}-{self._token}-{self._saves}"
        before = 0 if self._staging is None else self._staging.nbytes
        staged = live(parts) if self._staging is None else self._staging.take(parts)
        told: Record = {"event": "checkpoint", "step": step, "bytes": saving.nbytes}
        if self._staging is None:
            saving._path = self._write(step, folder, staged, values, metrics)
        else:
            saving._job = self._writer.submit(lambda: self._write(step, folder, staged, values, metrics),
                                              f"the save of step {step}")
            if self._staging.nbytes != before:
                told["staging_bytes"] = self._staging.nbytes
        saving.stall_s = told["stall_s"] = time.perf_counter() - begun
        self._record(told)
        return saving

    def foresee(self, state: Mapping[str, Any]) -> None:
        """Look, after the first step, whether the disk has room for a checkpoint of this state, and can be written.

        Raises:
            NoSpace: it has less than this rank's part of a checkpoint needs.
            CheckpointError: the directory cannot be written.
        """
        parts, _ = whole.out(whole.entered(state, self._place), self._place)
        preflight(self.directory, sum(part.nbytes for part in parts) + ROOM)

    def _out(self, state: Mapping[str, Any]) -> tuple[list[Part], dict[str, Any]]:
        """What this rank writes of a state; of what several stages of a pipeline hold, if it is the stage that does."""
        try:
            entered = whole.entered(state, self._place)
            held = whole.held(entered) if self._place.stages > 1 else Held({}, [])
        except Exception:
            self._writers.cannot()
            raise
        return whole.out(entered, self._place, self._writers.away(held))

    def _busy_anywhere(self) -> bool:
        """Whether any rank still writes: all have to skip, or none."""
        busy = self._writer.busy
        if self.wire is None or self.size == 1:
            return busy
        flag = torch.tensor(float(busy), dtype=torch.float64, device=self.wire.device)
        self.wire.all_reduce(flag, "max").wait()
        return bool(flag)

    def _write(self, step: int, folder: Path, staged: Staged, values: dict[str, Any],
               metrics: Mapping[str, float] | None) -> Path | None:
        begun = time.perf_counter()
        pieces = staged.pieces()
        self._check_peers()
        write_rank(folder, self.rank, self.size, pieces, values)
        told: Record = {"event": "checkpoint written", "step": step}
        path = None
        if self.rank == 0:
            path = publish(self.directory, folder, step, self.size, deadline_s=self.deadline_s, metrics=metrics,
                           waiting=lambda missing: self._check_peers(), whole=True)
            told |= {"path": str(path), "removed": [str(one) for one in prune(self.directory, self.keep)]}
        self._ended.append(told | {"seconds": time.perf_counter() - begun})
        return path

    def _check_peers(self) -> None:
        """Raise what has become of another rank: after a loss nothing is published."""
        if self.wire is not None and (failure := self.wire.watch.failure()) is not None:
            raise failure

    def check(self) -> None:
        """Raise the error of the last save, if it failed and nobody was told; it never waits. Call it now and then."""
        while self._ended:
            self._record(self._ended.pop(0))
        self._writer.check()

    # --- Loading ------------------------------------------------------------------------------------------------------

    def load(self, state: Mapping[str, Any], which: str | int | os.PathLike[str] = "newest",
             verify: bool = True) -> Loaded | None:
        """Load a checkpoint into a state; every rank calls it. See `fasttrain.checkpoint.load`."""
        self._writer.wait()
        return loading.load_at(self._place, self.directory, state, which, verify)

    # --- The end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for what is being written, and let go of memory and directory.

        Raises:
            Exception: the last save failed, and nobody was told.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._writer.wait()
            self.check()
        finally:
            if self._staging is not None:
                self._staging.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"and the last save failed: {type(failure).__name__}: {failure}")


def _nothing(record: Record) -> None:
    """Where records go that nobody wants."""
