"""A backward pass that an exception ended: seen as autograd lets go of it, and told to the other ranks with its cause.

The others wait for its gradients, so there is no way on. An exception that leaves the program is told by the watcher's
hook; one that the program catches, or is slow to end by, is told from here.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.failures import first_words, is_about_a_connection
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.work import WireError

GRACE_S = 1.0  # for the exception to end the program itself, and to be told with its whole traceback
RETRY_S = 2.0  # for the program to begin anew, where no gradient had come yet
BROKEN = "a backward pass ended with an exception, and its gradients were never sent"
engine = torch.autograd.Variable._execution_engine


class Ending:
    """What autograd calls when the outermost backward pass is over, or else lets go of.

    Arguments:
        over: called at the end.
        lost: called, with a `Cause`, when there will be none.
    """

    def __init__(self, over: Callable[[], None], lost: Callable[[Cause], None]):
        self._over, self._lost, self._called = over, lost, False
        engine.queue_callback(self)

    def __call__(self) -> None:
        if (node := torch._C._current_autograd_node()) is not None:  # only the inner pass of a re-entrant checkpoint
            node.register_hook(lambda *_: engine.queue_callback(self))
            return
        self._called = True
        try:
            self._over()
        except WireError:  # all ranks know
            raise
        except BaseException as error:
            self._lost(Cause(error))
            raise

    def __del__(self) -> None:
        if not self._called and not sys.is_finalizing():
            cause = Cause()
            cause.look(sys._getframe(1))
            self._lost(cause)


class Cause:
    """The exception that ended a backward pass, once it is known."""

    def __init__(self, error: BaseException | None = None):
        self.error = error

    def __str__(self) -> str:
        return BROKEN if self.error is None else f"{BROKEN}: {first_words(self.error)}"

    def look(self, frame: FrameType) -> None:
        """Learn of the exception as it comes up from C++ into the frame that called the engine.

        A debugger or a measurement of coverage has the one trace function that there is: then it stays unknown.
        """
        if frame.f_code.co_name != "_engine_run_backward" or sys.gettrace() is not None:
            return

        def event(frame: FrameType, kind: str, given: Any) -> Any:
            if kind == "exception":
                self.error = given[1]
            sys.settrace(None)
            frame.f_trace = None

        frame.f_trace = event
        sys.settrace(lambda *_: None)


def tell(watch: Any, cause: Cause, after_s: float, still: Callable[[], bool]) -> None:
    """Tell the other ranks, and end this process, unless that is under way after a while, or it is broken no longer."""
    if isinstance(watch, Watcher):
        threading.Thread(target=_tell, args=(watch, cause, after_s, still), name="fasttrain backward",
                         daemon=True).start()


def _tell(watch: Watcher, cause: Cause, after_s: float, still: Callable[[], bool]) -> None:
    if watch.ends_within(after_s) or not still():
        return
    error = cause.error
    trace = "" if error is None else "".join(traceback.format_exception(error))
    if isinstance(error, WireError) or (isinstance(error, RuntimeError) and is_about_a_connection(error)):
        os.write(2, trace.encode())
        watch.fail(error)  # perhaps only the echo of another rank's failure
    else:
        os.write(2, f"{trace}fasttrain: rank {watch.rank} ends: {cause}\n".encode())
        watch.fail(str(cause))


class Watched:
    """Tells of backward passes of a module that come to no end, where no reducer does: `fully_shard` has its own.

    Arguments:
        watch: of the ranks; with None nothing is told.
    """

    def __init__(self, watch: Any = None):
        self.watch, self._awaiting = watch, False

    def __reduce__(self) -> Any:
        return Watched, ()  # a copy of the module has no part in it

    def after_forward(self, module: Any, inputs: Any, outputs: Any) -> None:
        """A forward hook."""
        if isinstance(self.watch, Watcher) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            at_backward_of(outputs, self._begun)

    def _begun(self, _: Tensor) -> None:
        if not self._awaiting:
            self._awaiting = True
            Ending(self._over, self._lost)

    def _over(self) -> None:
        self._awaiting = False

    def _lost(self, cause: Cause) -> None:
        self._awaiting = False
        tell(self.watch, cause, GRACE_S, lambda: True)


def at_backward_of(outputs: Any, begins: Callable[[Tensor], None]) -> None:
    """Call `begins` when a backward pass comes to any of the tensors in nested lists, tuples and mappings."""
    if isinstance(outputs, Tensor):
        if outputs.grad_fn is not None:
            outputs.register_hook(begins)
    elif isinstance(outputs, (Mapping, list, tuple)):
        for one in outputs.values() if isinstance(outputs, Mapping) else outputs:
            at_backward_of(one, begins)
