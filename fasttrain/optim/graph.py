"""A whole training step in one CUDA graph, whose learning rates and other hyperparameters still change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim.drive import Drive
from fasttrain.optim.optimizer import Optimizer


class Recorder:
    """Torch's side of a CUDA graph; tests put something else in its place."""

    def __init__(self, pool: Any) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("a CUDA graph needs an NVIDIA GPU, and torch finds none: call the step function itself")
        self.graph, self.pool, self.stream = torch.cuda.CUDAGraph(), pool, torch.cuda.Stream()

    def warm(self, function: Callable[[], Any]) -> Any:
        """Call it on the stream that it is captured on, after what is queued now and before what will be."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            made = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return made

    def capture(self, function: Callable[[], Any]) -> Any:
        with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream):
            return function()

    def replay(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        self.graph.reset()


class StepGraph:
    """Runs a function that makes a training step: the first times as it is, then captured in a CUDA graph.

    A replay starts all kernels of the step at once and runs no Python. What changes from step to step must therefore be
    in memory: inputs, which are copied into those of the capture; and hyperparameters, which are sent to the device
    before each replay (`Optimizer.refresh`), so that schedules work as ever, outside of the function. A step is
    skipped, scaled and clipped as the device finds it. The bits are those of the function called without a graph.

    Arguments:
        function: zeroes gradients, runs forward and backward, steps; called with the inputs. It must not wait for the
            device (`item()`), and what it does in Python happens only in its calls without a graph. Its result, tensors
            in any structure, is memory of the graph that the next replay overwrites.
        optimizers: one of this package, or several: all that the function steps. From now on devices drive their steps.
        warmup: calls before the capture, at least 1. They are steps like any other.
        pool: memory shared with other graphs (`torch.cuda.graph_pool_handle()`).

    Raises:
        TypeError: an optimizer is not of this package.
        ValueError: `warmup` is not positive.
        RuntimeError: there is no GPU.

    Example:
        >>> import torch
        >>> from fasttrain import LossScaler, StepGraph
        >>> from fasttrain.optim import AdamW
        >>> def train(data, device="cuda"):
        ...     model = torch.nn.Linear(64, 1, device=device)
        ...     optimizer, scaler = AdamW(model.parameters(), lr=1e-3), LossScaler()
        ...     schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        ...     def step(x, y):
        ...         optimizer.zero_grad()
        ...         loss = torch.nn.functional.mse_loss(model(x), y)
        ...         scaler.scale(loss).backward()
        ...         scaler.step(optimizer, max_norm=1.0)
        ...         return loss
        ...     graph = StepGraph(step, optimizer)
        ...     for x, y in data:
        ...         loss = graph(x, y)
        ...         schedule.step()
        ...     return loss
        >>> if torch.cuda.is_available():
        ...     _ = train([(torch.randn(8, 64).cuda(), torch.randn(8, 1).cuda()) for _ in range(6)])
    """

    recorder: Callable[[Any], Any] = Recorder

    def __init__(self, function: Callable[..., Any], optimizers: Optimizer | Iterable[Optimizer], *, warmup: int = 3,
                 pool: Any = None) -> None:
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(f"{type(optimizer).__name__} is no optimizer of fasttrain: its steps cannot be driven "
                                "by the device, and its hyperparameters not be refreshed")
        if warmup < 1:
            raise ValueError(f"warmup is {warmup}: at least one step has to be made before the capture")
        self.function, self.left = function, warmup
        self.inputs: tuple[Any, ...] = ()
        self.result: Any = None
        self.captured = False
        self._recorder = type(self).recorder(pool)
        self._steps: list[tuple[Drive, Any]] = []  # that belong to the graph
        for optimizer in self.optimizers:
            optimizer._capturable = True

    def __call__(self, *inputs: Any) -> Any:
        """Make a step: without a graph at first, captured once it was warmed up, then by replays.

        Arguments:
            inputs: tensors, of the same shapes and dtypes each time; what is no tensor counts for the capture only.

        Returns:
            What the function returned; of a replay, in the graph's memory.
        """
        if not self.captured and self.left > 0:
            self.left -= 1
            return self._recorder.warm(lambda: self.function(*inputs))
        if not self.captured:
            self.capture(*inputs)
        return self.replay(*inputs)

    def capture(self, *inputs: Any) -> None:
        """Capture a step, which is not made; where the function was not called often enough, call it first.

        Raises:
            RuntimeError: something in the step cannot be captured; it is named, and parameters are as they were.
        """
        if self.captured:
            raise RuntimeError("the step is captured already: make another StepGraph")
        while self.left > 0:
            self(*inputs)
        self.inputs = tuple(one.detach().clone() if isinstance(one, Tensor) else one for one in inputs)
        drives = [optimizer._drive for optimizer in self.optimizers]
        before = [(drive, len(drive.captured)) for drive in drives if drive is not None]
        try:
            for drive in drives:
                if drive is not None:
                    drive.replayed = True
            self.refresh()
            self.result = self._recorder.capture(lambda: self.function(*self.inputs))
        except BaseException:
            for drive, count in before:
                del drive.captured[count:]
            self.left = 1  # before the next attempt: what was ready is spent
            raise
        finally:
            for drive in drives:
                if drive is not None:
                    drive.replayed = False
        self._steps = [(drive, step) for drive, count in before for step in drive.captured[count:]]
        self.captured = True

    def refresh(self) -> None:
        """Send the hyperparameters of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.refresh()

    def replay(self, *inputs: Any) -> Any:
        """Make the captured step, with the hyperparameters of now.

        Arguments:
            inputs: as in the capture, or none, to take those that the graph has.

        Raises:
            RuntimeError: nothing was captured, or states were replaced since then (`load_state_dict`).
            ValueError: the inputs are not like those of the capture; no step was made.
        """
        if not self.captured:
            raise RuntimeError("no step was captured: call capture(), or the StepGraph itself")
        if inputs:
            self._take(inputs)
        self.refresh()
        self._recorder.replay()
        return self.result

    def _take(self, inputs: Sequence[Any]) -> None:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{len(inputs)} inputs are given; the step was captured with {len(self.inputs)}")
        for place, (new, own) in enumerate(zip(inputs, self.inputs, strict=True)):
            if isinstance(own, Tensor) and not (isinstance(new, Tensor) and new.shape == own.shape
                                                and new.dtype == own.dtype):
                found = f"{new.dtype} of shape {tuple(new.shape)}" if isinstance(new, Tensor) else f"{new!r}"
                raise ValueError(f"input {place} is {found}; the step was captured with {own.dtype} of shape "
                                 f"{tuple(own.shape)}: make another StepGraph for it")
        for new, own in zip(inputs, self.inputs, strict=True):
            if isinstance(own, Tensor) and new is not own:
                own.copy_(new, non_blocking=True)

    def close(self) -> None:
        """Free the graph and what belongs to it."""
        for drive, step in self._steps:
            for kept in (drive.captured, drive.outdated):
                kept[:] = [one for one in kept if one is not step]
        self._steps, self.captured, self.result = [], False, None
        self._recorder.reset()
