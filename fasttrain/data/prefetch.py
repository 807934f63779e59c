"""Samples fetched ahead of their use: in the caller's thread, in threads, or in worker processes; always in order.

Each way is made with a source and `finish`, which makes of the fetched arrays what the caller takes; `ask` begins to
fetch samples, `take` gives the oldest result that has not been taken, or raises what went wrong with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import cycle
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from fasttrain.data.position import Runs, numbers
from fasttrain.data.processes import Worker
from fasttrain.data.windows import Source

Finish = Callable[[dict[str, np.ndarray]], Any]


class Here:
    """Fetches when the result is taken."""

    def __init__(self, source: Source, finish: Finish):
        self.source, self.finish = source, finish
        self.asked: deque[Runs] = deque()

    def ask(self, runs: Runs) -> None:
        self.asked.append(runs)

    def take(self) -> Any:
        return self.finish(self.source.fetch(numbers(self.asked.popleft())))

    def close(self) -> None:
        """Nothing runs."""


class Lane:
    """A thread that does one thing after another, and the results of it in order.

    Two queues of C cost a tenth of a pool's futures, and copying a small batch costs no more than that.
    """

    def __init__(self, do: Callable[[Any], Any]):
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.outbox: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self.thread = Thread(target=_work, args=(do, self.inbox, self.outbox), name="fasttrain-loader", daemon=True)
        self.thread.start()

    def result(self) -> Any:
        """The next one; waits for it. What went wrong with it is raised."""
        value, error = self.outbox.get()
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the thread, when it has done what it is at."""
        with suppress(Empty):
            while True:
                self.inbox.get_nowait()
        self.inbox.put(None)
        self.thread.join()


def _work(do: Callable[[Any], Any], inbox: SimpleQueue[Any], outbox: SimpleQueue[Any]) -> None:
    while (asked := inbox.get()) is not None:
        try:
            outbox.put((do(asked), None))
        except BaseException as error:  # raised where the result is taken
            outbox.put((None, error))


class Threads:
    """Fetches in threads of this process, which take turns."""

    def __init__(self, source: Source, finish: Finish, workers: int):
        self.lanes = [Lane(lambda runs: finish(source.fetch(numbers(runs)))) for _ in range(workers)]
        self.turns, self.asked = cycle(self.lanes), deque[Lane]()

    def ask(self, runs: Runs) -> None:
        lane = next(self.turns)
        lane.inbox.put(runs)
        self.asked.append(lane)

    def take(self) -> Any:
        return self.asked.popleft().result()

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()


class Fetcher:
    """What a worker process is given."""

    def __init__(self, source: Source):
        self.source = source

    def fetch(self, runs: Runs) -> dict[str, np.ndarray]:
        return self.source.fetch(numbers(runs))


class Processes:
    """Fetches in worker processes, which take turns; a thread for each receives and finishes what it sends."""

    def __init__(self, source: Source, finish: Finish, workers: int):
        self.workers: list[tuple[Worker, Lane]] = []
        try:
            for number in range(workers):
                worker = Worker(Fetcher(source), f"worker {number} of the loader")
                self.workers.append((worker, Lane(partial(_received, worker, finish))))
        except BaseException:
            self.close()
            raise
        self.turns, self.asked = cycle(self.workers), deque[Lane]()

    def ask(self, runs: Runs) -> None:
        worker, lane = next(self.turns)
        worker.ask("fetch", runs)
        lane.inbox.put(runs)
        self.asked.append(lane)

    def take(self) -> Any:
        return self.asked.popleft().result()

    def close(self) -> None:
        """End the processes; the threads, which may wait for them, see that."""
        for worker, _ in self.workers:
            worker.kill()
        for worker, lane in self.workers:
            lane.close()
            worker.close()


def _received(worker: Worker, finish: Finish, runs: Runs) -> Any:
    return finish(worker.answer()[1])


def start(source: Source, finish: Finish, workers: int, processes: bool) -> Here | Threads | Processes:
    """The way of fetching that a loader was asked for."""
    if not workers:
        return Here(source, finish)
    return Processes(source, finish, workers) if processes else Threads(source, finish, workers)
