"""Samples fetched ahead of their use: in the caller's thread, in threads, or in worker processes; always in order.

Each way is made with a source and `finish`, which makes of the fetched arrays what the caller takes; `ask` begins to
fetch samples, `take` gives the oldest result that has not been taken, or raises what went wrong with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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


class Threads:
    """Fetches in threads of this process."""

    def __init__(self, source: Source, finish: Finish, workers: int):
        self.source, self.finish = source, finish
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="fasttrain-loader")
        self.asked: deque[Future[Any]] = deque()

    def ask(self, runs: Runs) -> None:
        self.asked.append(self.pool.submit(lambda: self.finish(self.source.fetch(numbers(runs)))))

    def take(self) -> Any:
        return self.asked.popleft().result()

    def close(self) -> None:
        """End the threads; those at work finish what they are at."""
        self.pool.shutdown(cancel_futures=True)


class Fetcher:
    """What a worker process is given."""

    def __init__(self, source: Source):
        self.source = source

    def fetch(self, runs: Runs) -> dict[str, np.ndarray]:
        return self.source.fetch(numbers(runs))


class Processes:
    """Fetches in worker processes, which take turns; a thread receives and finishes what they send."""

    def __init__(self, source: Source, finish: Finish, workers: int):
        self.finish = finish
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="fasttrain-loader")
        self.asked: deque[Future[Any]] = deque()
        self.next = 0
        self.workers: list[Worker] = []
        try:
            for number in range(workers):
                self.workers.append(Worker(Fetcher(source), f"worker {number} of the loader"))
        except BaseException:
            self.close()
            raise

    def ask(self, runs: Runs) -> None:
        worker = self.workers[self.next % len(self.workers)]
        self.next += 1
        worker.ask("fetch", runs)
        self.asked.append(self.pool.submit(lambda: self.finish(worker.answer()[1])))

    def take(self) -> Any:
        return self.asked.popleft().result()

    def close(self) -> None:
        """End the processes; the thread, which may wait for one, sees that."""
        for worker in self.workers:
            worker.kill()
        self.pool.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.close()


def start(source: Source, finish: Finish, workers: int, processes: bool) -> Here | Threads | Processes:
    """The way of fetching that a loader was asked for."""
    if not workers:
        return Here(source, finish)
    return Processes(source, finish, workers) if processes else Threads(source, finish, workers)
