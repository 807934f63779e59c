"""Where the records of a run go: a log, the console, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fasttrain.train.config import TrainConfig
from fasttrain.train.console import Console
from fasttrain.train.journal import Journal, Record
from fasttrain.train.tensorboard import TensorBoard


@contextmanager
def telling(config: TrainConfig, directory: Path, first: bool, restarts: int) -> Iterator[Callable[[Record], None]]:
    """What takes the records on this rank: of the first one they are written and shown, of all others nothing is.

    Arguments:
        directory: of the run.
        first: this is the first rank.
        restarts: how often all ranks have been started again.
    """
    with ExitStack() as stack:
        listeners: list[Callable[[Record], None]] = []
        if first:
            journal = Journal(directory / "log.jsonl")
            stack.callback(journal.close)
            listeners += [journal.write, stack.enter_context(Console(config.steps)).show]
            if config.tensorboard:
                board = TensorBoard(directory / "tensorboard")
                stack.callback(board.close)
                listeners.append(board)

        def tell(record: Record) -> None:
            for listener in listeners:
                listener(record)

        if restarts:
            times = "once" if restarts == 1 else f"{restarts} times"
            tell({"event": "restart", "step": 0, "number": restarts, "text": f"started again ({times} by now)"})
        yield tell
