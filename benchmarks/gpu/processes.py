"""A command as a process of its own, ended with all that it started when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """What became of a process.

    Attributes:
        status: its exit status, negative for a signal; None if it was ended because its time was up.
        said: all that it printed.
        seconds: how long it took.
    """

    status: int | None
    said: str
    seconds: float

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.said.strip().splitlines()[-lines:])


def execute(command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None,
            late: Callable[[], bool] = lambda: False) -> Done:
    """Run a command in the repository's root.

    Arguments:
        limit: seconds after which it is ended.
        environment: variables that are set beside those of this process.
        late: asked several times a second; ends the process when it says so.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                                   stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
        status = None
        try:
            while (status := process.poll()) is None and time.monotonic() - begin < limit and not late():
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        return Done(status, said.read(), time.monotonic() - begin)
