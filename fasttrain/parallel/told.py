"""Gradients whose completeness a program tells, where no backward pass shows it: the schedule of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fasttrain.dist.control import Outcome
from fasttrain.parallel.passes import Passes


class Told(Passes):
    """What `fasttrain.parallel.reducer.Reducer` does where it is told of gradients; see there."""

    _reducing = False  # `reduce` has begun a step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes within only accumulate in `p.grad`, as torch does it, and begin and end nothing here.

        Which of them is a parameter's last, `reduce` is told; schedules of pipelines run several backward passes for a
        step, in parts that see a parameter in none, one or all of them.

        Example:
            >>> with reducer.paused():                                                  # doctest: +SKIP
            ...     schedule.step(batch)
            >>> reducer.reduce()                                                        # doctest: +SKIP
            >>> reducer.finish()                                                        # doctest: +SKIP
        """
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def reduce(self, params: Iterable[Tensor] | None = None) -> None:
        """Take gradients as complete in this step, and send the buckets that are full, in the order of the layout.

        `finish` ends the step. Every rank of a stage calls both, with any division of its parameters over calls.

        Arguments:
            params: whose gradients will not change any more; None: all that are left. One without a gradient counts as
                zero, as in a backward pass.

        Raises:
            ValueError: a parameter that is not of this reducer.
            RuntimeError: it was given before in this step; a backward pass is under way that these hooks follow.
        """
        if self.idle:
            return
        indices = self._indices(params)
        if self._open is not None:
            raise RuntimeError("reduce() was called within a backward pass that is followed by hooks: run it in "
                               "paused()")
        if not self._reducing:
            self._reducing = True
            self.method.begin()
            self._start()
        for index in indices:
            bucket, place = self._where[index]
            if params is None and bucket.arrived[place]:
                continue
            if self.params[index].grad is None:
                bucket.absent(place)
            else:
                self._complete(index)
        self._send_ready()

    def finish(self) -> Outcome | None:
        """End the step where no synchronised backward pass did: send what there is, and compare what the ranks did.

        `optimizer.step()` calls it for parameters that were not reduced, so that a rank without a gradient answers the
        others.

        Raises:
            Disagreement: they did not do the same; on every rank, and no gradient is to be trusted.
        """
        if self.idle:
            self.sequence += 1
            return None
        if self._reducing:
            self._reducing = False
            self._finish(late=False)
            return self.last
        self.check_closed()
        self.method.begin()
        self._start()
        self._finish(late=True)
        return self.last

    def check_closed(self) -> None:
        raise NotImplementedError

    def _indices(self, params: Iterable[Tensor] | None) -> list[int]:
        if params is None:
            return list(range(len(self.params)))
        found = []
        for p in params:
            if p not in self._index:
                raise ValueError(f"a parameter of the shape {tuple(p.shape)} is not one of the {len(self.params)} of "
                                 "this reducer")
            found.append(self._index[p])
        return found
