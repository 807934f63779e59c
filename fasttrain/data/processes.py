"""Worker processes: fresh interpreters at the end of a socket, with one object each, whose methods they are asked for.

They are started, never forked, so that no thread, lock or GPU context of the parent is in them, and the parent's main
script is not imported again. What travels goes through a socket: /dev/shm is not used, however small it is. They import
neither torch nor what the object does not need, and end when the parent does.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from fasttrain.data.errors import DataError, WorkerDied

START = "import sys; from fasttrain.data.processes import serve; serve(int(sys.argv[1]))"


class Worker:
    """One process that answers requests in their order.

    Args:
        target: what its methods are called of; pickled.
        name: in messages, as "worker 1 of the loader".

    Raises:
        DataError: the target cannot be pickled.
    """

    def __init__(self, target: Any, name: str):
        self.name = name
        if type(target).__module__ == "__main__":
            raise DataError(f"{name} cannot get a {type(target).__name__}: it is defined in the main script, which "
                            f"workers do not run; put the class into a module, or use threads")
        try:
            packed = pickle.dumps(target)
        except Exception as error:  # whatever the target's own methods raise
            raise DataError(f"{name} cannot get a {type(target).__name__}: it cannot be pickled ({error}); use "
                            f"threads") from error
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                           "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            self.process = subprocess.Popen([sys.executable, "-c", START, str(theirs.fileno())], env=environment,
                                            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.connection = Connection(ours.detach())
        try:
            self.connection.send_bytes(packed)
        except OSError:
            raise self._died() from None

    def ask(self, method: str, *arguments: Any) -> None:
        """Send a request; `answer` gives what becomes of it."""
        try:
            self.connection.send((method, arguments))
        except OSError:
            raise self._died() from None

    def answer(self) -> Any:
        """The next answer: ("value", what the method returned), or ("part", what it yielded before it does).

        Raises:
            WorkerDied: the process has ended.
            Exception: what the method raised.
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if kind == "error":
            value.add_note(f"raised in {self.name}")
            raise value
        return kind, value

    def _died(self) -> WorkerDied:
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return WorkerDied(f"{self.name} closed its connection")
        if code >= 0:
            return WorkerDied(f"{self.name} ended with exit code {code}; what it said is above")
        how = signal.Signals(-code).name
        hint = {"SIGKILL": ": out of memory, or ended by somebody; use fewer workers or threads",
                "SIGBUS": ": a file was cut off while it was read"}.get(how, "")
        return WorkerDied(f"{self.name} (process {self.process.pid}) was killed by {how}{hint}")

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the process and the connection, which no thread waits for any more."""
        self.kill()
        self.connection.close()


def answers(workers: Sequence[Worker]) -> Iterator[tuple[Worker, Any]]:
    """Wait for workers, and give the answers that are there, one for each."""
    by_connection = {worker.connection: worker for worker in workers}
    for connection in wait(list(by_connection)):
        worker = by_connection[connection]  # type: ignore[index]
        yield worker, worker.answer()


def serve(descriptor: int) -> None:
    """What a worker process does: answer until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    connection = Connection(descriptor)
    try:
        target, failed = None, None
        try:
            target = pickle.loads(connection.recv_bytes())
        except Exception as error:
            failed = error
        while True:
            method, arguments = connection.recv()
            try:
                if failed:
                    raise failed
                value = getattr(target, method)(*arguments)
                while isinstance(value, types.GeneratorType):
                    try:
                        connection.send(("part", next(value)))
                    except StopIteration as end:
                        value = end.value
                answer: tuple[str, Any] = ("value", value)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                answer = ("error", _sendable(error))
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent has ended, or wants no more


def _sendable(error: Exception) -> Exception:
    """The error, or, where it would not survive pickling, one that has its text."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
