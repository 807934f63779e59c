"""What a loop does with its checkpoints: go on from one, save on time and in trouble, go back before a spike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fasttrain.checkpoint.checkpointer import Checkpointer, Saving
from fasttrain.checkpoint.errors import CheckpointError
from fasttrain.checkpoint.loading import Loaded
from fasttrain.dist.wire import Wire
from fasttrain.guards.bad_steps import TooManyBadSteps

KNOWN = 100  # saved steps that are remembered
Record = dict[str, Any]


class Keeper:
    """Saves and loads the state of a loop.

    Arguments:
        checkpoints: where to; None: nothing is saved.
        state: as `Checkpointer.save` takes it; "data" in it is what gives batches.
        wire: to the other ranks.

    Attributes:
        saved: steps after which checkpoints were saved, the last of them; part of the state.
    """

    def __init__(self, checkpoints: Checkpointer | None, state: Mapping[str, Any], wire: Wire | None):
        self.checkpoints, self.wire = checkpoints, wire
        self.saved: list[int] = []
        self.state = {**state, "keeper": self}
        self._foreseen = False
        self._under_way = False              # a batch was taken whose step is not made yet
        self._before: Record | None = None  # the position of the data before it
        self._undo = Undo(state)
        self._last: Saving | None = None

    def state_dict(self) -> Record:
        """JSON values."""
        return {"saved": self.saved}

    def load_state_dict(self, state: Record) -> None:
        """Take over what `state_dict` returned."""
        self.saved = list(state["saved"])

    def resume(self) -> Loaded | None:
        """Load the newest checkpoint that can be used; None if there is none."""
        return None if self.checkpoints is None else self.checkpoints.load(self.state)

    def due(self, step: int) -> bool:
        """Whether a save belongs after this step. What went wrong with the last one is raised here."""
        if self.checkpoints is None:
            return False
        self.checkpoints.check()
        return self.checkpoints.due(step)

    def save(self, step: int, metrics: Mapping[str, Any], last: bool = False) -> None:
        """Save the state after this step, if that was not done.

        Arguments:
            last: of the run: it is not skipped because the one before is still being written.
        """
        if self.checkpoints is None or step in self.saved[-1:]:
            return
        if last and self._last is not None:
            self._last.wait()
        before, self.saved = self.saved, [*self.saved, step][-KNOWN:]
        saving = None
        try:
            saving = self.checkpoints.save(step, self.state, {name: float(value) for name, value in metrics.items()
                                                              if isinstance(value, (int, float))})
        finally:
            if saving is None or saving.skipped:
                self.saved = before
            else:
                self._last = saving

    def taking(self) -> None:
        """A batch is about to be taken from the data."""
        data: Any = self.state.get("data")
        self._before = data.state_dict() if hasattr(data, "rewind") else None
        self._under_way = True
        if self.checkpoints is not None and self._alone and self._before is not None:
            self._undo.remember()

    def taken(self) -> None:
        """Its step is made. After the first there is something to say of what a checkpoint will need."""
        self._under_way = False
        if self.checkpoints is not None and not self._foreseen:
            self.checkpoints.foresee(self.state)
            self._foreseen = True

    @property
    def _alone(self) -> bool:
        return self.wire is None or self.wire.size == 1

    def save_after(self, error: Exception, step: int, metrics: Mapping[str, Any]) -> None:
        """Save what an exception leaves, where that is a state between two steps, and every rank has it.

        Of a batch whose step was not made parameters must not have changed; data, random generators and buffers go
        back before it. What goes wrong with saving is told beside the error.
        """
        together = self._alone or isinstance(error, TooManyBadSteps)
        if self.checkpoints is None or not together or step in self.saved[-1:]:
            return
        if self._under_way and self._before is None:
            error.add_note(f"the state after step {step} is not saved: the data cannot go back before the batch that "
                           "was taken (it has no rewind)")
            return
        if self._under_way:
            self.state["data"].load_state_dict(self._before)
            self._undo.restore()
        try:
            self.save(step, metrics, last=True)
            self.checkpoints.close()
        except Exception as failure:
            error.add_note(f"and the state after step {step} could not be saved: {type(failure).__name__}: {failure}")
            return
        error.add_note(f"the state after step {step} is saved in {self.checkpoints.directory}")

    def go_back(self, since: int, first: int, count: int) -> int:
        """Load the newest checkpoint from before step `since`, and leave out `count` samples from `first` on.

        Returns:
            The step of that checkpoint.

        Raises:
            RuntimeError: there is none.
        """
        state = {**self.state, "data": _Rewound(self.state["data"], first, count)}
        lost: CheckpointError | None = None
        for step in [step for step in reversed(self.saved) if step < since]:
            try:
                assert self.checkpoints is not None
                self.checkpoints.load(state, which=step)
            except CheckpointError as error:
                lost = error  # it is no longer kept, or damaged
                continue
            return step
        raise RuntimeError(f"the loss went up at step {since}, and there is no checkpoint from before it: save more "
                           "often, or keep more") from lost


class Undo:
    """What a forward pass changes beside gradients, as it was before: random generators and buffers.

    Copied are the buffers of modules that a step has been seen to write (BatchNorm's), and all before the first.
    Those of one module go together: torch counts versions of BatchNorm's number of batches, and not of its means.

    Arguments:
        state: with a "model" and "rng".
    """

    def __init__(self, state: Mapping[str, Any]):
        self.state = state
        self._modules: list[list[Any]] | None = None  # their buffers
        self._versions: list[list[int]] = []           # when they were last looked at
        self._live: set[int] = set()
        self._copies: list[tuple[Any, Any]] = []
        self._random: Record | None = None

    def remember(self) -> None:
        """A forward pass is about to begin."""
        rng = self.state.get("rng")
        self._random = None if rng is None else rng.state_dict()
        first = self._modules is None
        modules = self._modules = self._modules if self._modules is not None else [
            own for module in self.state["model"].modules() if (own := list(module.buffers(recurse=False)))]
        versions = [[buffer._version for buffer in own] for own in modules]
        if not first:
            self._live.update(i for i, now in enumerate(versions) if now != self._versions[i])
        self._versions = versions
        self._copies = [(buffer, buffer.detach().clone()) for i, own in enumerate(modules) if first or i in self._live
                        for buffer in own]

    def restore(self) -> None:
        """Put back what was remembered."""
        if self._random is not None:
            self.state["rng"].load_state_dict(self._random)
        with torch.no_grad():
            for buffer, copy in self._copies:
                buffer.copy_(copy)


class _Rewound:
    """In the place of a loader in a state that is loaded: it goes back past some samples."""

    def __init__(self, data: Any, first: int, count: int):
        self.data, self.first, self.count = data, first, count

    def state_dict(self) -> Record:
        return self.data.state_dict()

    def load_state_dict(self, state: Record) -> None:
        self.data.rewind(state, self.first, self.count)
