"""Works of several stages: messages, then something made of what they brought, then perhaps more messages."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fasttrain.dist.work import Post, Work


class Ticket(NamedTuple):
    """A collective's number, counted from 1 and the same on all ranks, its kind, and on how many bytes."""

    number: int
    kind: str
    nbytes: int


CLOSE_S = 5.0  # that closing waits for a thread
Stage = tuple[Sequence[Any], Callable[[], Any]]


class Staged(Work):
    """Messages, then something made of what they brought, then perhaps more messages: see `Lines`."""

    def __init__(self, post: Post, kind: str, nbytes: int):
        super().__init__(post, kind, nbytes)
        self.ended = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def done(self) -> bool:
        return self.ended.is_set()

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        """What it came to."""
        self.result, self.error = result, error
        self.ended.set()

    def _rest(self, seconds: float) -> bool:
        if not self.ended.wait(seconds):
            return False
        if self.error is not None:
            raise self.error
        return True

    def _result(self) -> Any:
        return self.result


class OnDevice(Work):
    """The stages in order on a stream of their own; the host waits for none.

    It keeps what the stages use until it is dropped, which is after `wait`: so memory is not used again too early.
    """

    def __init__(self, post: Post, kind: str, nbytes: int, stage: Stage, stream: Any):
        super().__init__(post, kind, nbytes)
        self.stages = [stage]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            while True:
                handles, then = self.stages[-1]
                for handle in handles:
                    handle.wait()
                self.result = then()
                if not isinstance(self.result, Next):
                    break
                self.stages.append(self.result.stage)
            self.event = stream.record_event()

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> Any:
        torch.cuda.current_stream().wait_event(self.event)
        return self.result


class Lines:
    """The threads that take works from stage to stage while the program does something else: one for each stage.

    A stage is messages that have been posted already, and a function to call when all have arrived, which returns the
    result, or the next stage. In each line they are served in the order in which they came. gloo's messages can only
    be waited for without limit (a limit that is reached ends every other message too): so these threads do, and the
    program waits for them, with a limit.
    """

    def __init__(self) -> None:
        self._lines: list[queue.SimpleQueue[tuple[Staged, Stage] | None]] = []
        self._threads: list[threading.Thread] = []

    def put(self, work: Staged, stage: Stage, line: int = 0) -> None:
        """Go on with a work at this stage, in that line."""
        while len(self._lines) <= line:
            waiting: queue.SimpleQueue[tuple[Staged, Stage] | None] = queue.SimpleQueue()
            number = len(self._lines)
            self._threads.append(threading.Thread(target=self._serve, args=(waiting, number),
                                                  name=f"fasttrain wire {number}", daemon=True))
            self._threads[-1].start()
            self._lines.append(waiting)
        self._lines[line].put((work, stage))

    def close(self) -> None:
        """End the threads, after what they have, and wait for their end.

        They let go of torch's works then, whose destructor takes the interpreter's lock once more: if the interpreter
        came to its end meanwhile, that would abort the process.
        """
        number = 0
        while number < len(self._lines):  # one may still hand on to the next
            self._lines[number].put(None)
            self._threads[number].join(CLOSE_S)
            number += 1
        self._lines.clear()
        self._threads.clear()

    def _serve(self, waiting: queue.SimpleQueue[tuple[Staged, Stage] | None], number: int) -> None:
        while (item := waiting.get()) is not None:
            work, (handles, then) = item
            try:
                for handle in handles:
                    handle.wait()
                result = then()
            except Exception as error:  # raised where the work is waited for
                work.end(error=error)
                continue
            if isinstance(result, Next):
                self.put(work, result.stage, number + 1)
            else:
                work.end(result)


class Next(NamedTuple):
    """What the function of a stage returns if another stage follows."""

    stage: Stage
