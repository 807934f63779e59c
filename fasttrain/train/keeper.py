"""What a loop does with its checkpoints: go on from one, save on time and in trouble, go back before a spike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasttrain.checkpoint.checkpointer import Checkpointer
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

    def save(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Save the state after this step, if that was not done."""
        if self.checkpoints is not None and step not in self.saved[-1:]:
            self.saved = [*self.saved, step][-KNOWN:]
            self.checkpoints.save(step, self.state, {name: float(value) for name, value in metrics.items()
                                                     if isinstance(value, (int, float))})

    def taking(self) -> None:
        """A batch is about to be taken from the data."""
        data: Any = self.state.get("data")
        self._before = data.state_dict() if hasattr(data, "rewind") else None
        self._under_way = True

    def taken(self) -> None:
        """Its step is made. After the first there is something to say of what a checkpoint will need."""
        self._under_way = False
        if self.checkpoints is not None and not self._foreseen:
            self.checkpoints.foresee(self.state)
            self._foreseen = True

    def save_after(self, error: Exception, step: int, metrics: Mapping[str, Any]) -> None:
        """Save what an exception leaves, where that is a state between two steps, and every rank has it.

        Of a batch whose step was not made parameters must not have changed; the data goes back before it.
        """
        together = self.wire is None or self.wire.size == 1 or isinstance(error, TooManyBadSteps)
        if self.checkpoints is None or not together or step in self.saved[-1:]:
            return
        if self._under_way and self._before is None:
            return  # the data cannot go back
        if self._under_way:
            self.state["data"].load_state_dict(self._before)
        self.save(step, metrics)
        self.checkpoints.close()
        error.add_note(f"the state after step {step} is saved in {self.checkpoints.directory}")

    def go_back(self, since: int, first: int, count: int) -> int:
        """Load the newest checkpoint from before step `since`, and leave out `count` samples from `first` on.

        Returns:
            The step of that checkpoint.

        Raises:
            RuntimeError: there is none.
        """
        before = [step for step in self.saved if step < since]
        if self.checkpoints is None or not before:
            raise RuntimeError(f"the loss went up at step {since}, and no checkpoint is older: save more often")
        self.checkpoints.load({**self.state, "data": _Rewound(self.state["data"], first, count)}, which=before[-1])
        return before[-1]


class _Rewound:
    """In the place of a loader in a state that is loaded: it goes back past some samples."""

    def __init__(self, data: Any, first: int, count: int):
        self.data, self.first, self.count = data, first, count

    def state_dict(self) -> Record:
        return self.data.state_dict()

    def load_state_dict(self, state: Record) -> None:
        self.data.rewind(state, self.first, self.count)
