"""A backward pass that an exception ended: seen as autograd lets go of it, and told to the other ranks with its cause.

The others wait for its gradients, so there is no way on. An exception that leaves the program is told by the watcher's
hook; one that the program catches, or is slow to end by, is told from here. Before the first gradient, and in a forward
pass, the program may try again: the others are told only if they wait and it does not.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.failures import first_words, is_about_a_connection
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire
from fasttrain.dist.work import WireError

GRACE_S = 1.0  # for the exception to end the program itself, and to be told with its whole traceback
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
            cause.look(sys._getframe().f_back)
            self._lost(cause)


class Cause:
    """The exception that ended a backward pass, once it is known. It is told of, not kept: its frames hold the graph.

    Attributes:
        words: its type and text.
        trace: its traceback, from the program on.
        echo: a copy, if it may be only the echo of another rank's failure.
    """

    def __init__(self, error: BaseException | None = None):
        self.words = self.trace = ""
        self.echo: BaseException | None = None
        if error is not None:
            self.known(error, None)

    def __str__(self) -> str:
        return f"{BROKEN}: {self.words}" if self.words else BROKEN

    def known(self, error: BaseException, above: FrameType | None) -> None:
        """This is the exception; `above`: the frame that it comes to next."""
        stack = [] if above is None else traceback.format_stack(above)
        self.words = first_words(error)
        self.trace = "".join(["Traceback (most recent call last):\n", *stack, *traceback.format_tb(error.__traceback__),
                              *traceback.format_exception_only(error)])
        if isinstance(error, WireError) or (isinstance(error, RuntimeError) and is_about_a_connection(error)):
            self.echo = copy.copy(error)  # without its frames

    def look(self, frame: FrameType | None) -> None:
        """Learn of the exception as it comes up from C++ into the frame that called the engine.

        A debugger or a measurement of coverage has the one trace function that there is: then it stays unknown.
        """
        if frame is None or frame.f_code.co_name != "_engine_run_backward" or sys.gettrace() is not None:
            return

        def event(frame: FrameType, kind: str, given: Any) -> None:
            sys.settrace(None)
            frame.f_trace = None
            if kind == "exception":
                self.known(given[1], frame.f_back)

        frame.f_trace = event
        sys.settrace(lambda *_: None)


def tell(wire: Wire, cause: Cause) -> None:
    """Tell the other ranks, and end this process, unless that is under way after a while."""
    if isinstance(wire.watch, Watcher) and wire.size > 1:
        threading.Thread(target=_tell, args=(wire.watch, cause), name="fasttrain backward", daemon=True).start()


def _tell(watch: Watcher, cause: Cause) -> None:
    if watch.ends_within(GRACE_S):
        return
    own = "" if cause.echo is not None else f"fasttrain: rank {watch.rank} ends: {cause}\n"
    os.write(2, f"{cause.trace}{own}".encode())
    watch.fail(str(cause) if cause.echo is None else cause.echo)


class Watched:
    """Tells of backward passes of a module that come to no end, where no reducer does: `fully_shard` has its own.

    Arguments:
        wire: to the other ranks; with None nothing is told.
    """

    def __init__(self, wire: Wire | None = None):
        self.wire, self._awaiting = wire, False

    def __reduce__(self) -> Any:
        return Watched, ()  # a copy of the module has no part in it

    def after_forward(self, module: Any, inputs: Any, outputs: Any) -> None:
        """A forward hook."""
        if self.wire is not None:
            at_backward_of(outputs, self.wire, self._begun)

    def _begun(self, _: Tensor) -> None:
        if not self._awaiting:
            self._awaiting = True
            Ending(self._over, self._lost)

    def _over(self) -> None:
        self._awaiting = False

    def _lost(self, cause: Cause) -> None:
        self._awaiting = False
        if self.wire is not None:
            tell(self.wire, cause)


def at_backward_of(outputs: Any, wire: Wire, begins: Callable[[Tensor], None]) -> None:
    """Call `begins` when a backward pass comes to outputs of a model, if there is anyone to tell how it ends."""
    if isinstance(wire.watch, Watcher) and wire.size > 1 and not torch.compiler.is_compiling():
        for tensor in _tensors(outputs):
            if tensor.grad_fn is not None:
                tensor.register_hook(begins)


def _tensors(given: Any) -> Iterator[Tensor]:
    """Those in nested lists, tuples and mappings."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (Mapping, list, tuple)):
        for one in given.values() if isinstance(given, Mapping) else given:
            yield from _tensors(one)
