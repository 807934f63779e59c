"""Processes for tests, forked from one that has torch loaded already: a new one would spend seconds in imports.

They come from a fork server, never from the test process, whose threads a fork would not survive. The server has never
loaded the compiled module nor started a thread: a process chooses its instruction set and its threads like a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([
    "torch", "torch.distributed", "fasttrain.parallel", "fasttrain.dist.watcher", "fasttrain.train.loop",
    "fasttrain.train.recipe", "fasttrain.checkpoint.checkpointer", "fasttrain.checkpoint.stopping", "pytest",
    "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel", "torch.distributed.pipelining", "fasttrain.parallel.pipeline",
    # Each rank that makes a DTensor would import these, for half a second of its own.
    "torch._dynamo", "torch.distributed.tensor.debug", "torch.profiler._cupti_monitor", "numpy.random", "fsspec"])


def python(code: str, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that can import the package and the tests; it ends with all that it forked."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "out"), Path(folder, "errors")
        process = context.Process(target=_python, args=(code, arguments, {**os.environ, **environment}, said))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(code, timeout, *(path.read_text() for path in said if path.exists()))
        finally:
            if process.exitcode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        return subprocess.CompletedProcess(code, process.exitcode, *(path.read_text() for path in said))


def _python(code: str, arguments: tuple[str, ...], environment: dict[str, str], said: tuple[Path, Path]) -> None:
    os.setsid()
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    assert "fasttrain._native" not in sys.modules, "what the fork server imports must not load it: its choices are made"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
