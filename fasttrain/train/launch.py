"""Starts the processes of a run with torchrun, waits for them, and says why if they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fasttrain.dist.failures import PEER_FAILED

STOPPED = (PEER_FAILED, -signal.SIGTERM, 128 + signal.SIGTERM)  # exit codes of those that were told to end


class RunFailed(RuntimeError):
    """A process of the run ended before its time. The text says which, and why."""


def launch(directory: Path, processes: int, threads: int, restarts: int = 0) -> None:
    """Run ``fasttrain.train.rank`` in `processes` processes under torchrun, and return when all have finished.

    When one fails all are started again, at most `restarts` times.

    What they print to standard output goes to ours; their standard error (warnings, tracebacks, torchrun's report) to
    ``directory/stderr.log``, which is removed if it stays empty. They get no signals from the terminal: when this
    function is interrupted it ends them. Should this process be killed, they end by themselves, by
    `rank.end_with_parent`.

    Raises:
        RunFailed: one of them failed; all have ended.
        KeyboardInterrupt: as it came; all have ended.
    """
    errors = directory / "stderr.log"
    with tempfile.TemporaryDirectory(prefix="fasttrain-") as scratch, open(errors, "wb") as stderr:
        report = Path(scratch, "failures.json")
        torchrun = [
            sys.executable, "-m", "fasttrain.train.launch", str(report),
            "--standalone", f"--nproc-per-node={processes}", "--local-addr=127.0.0.1",
            f"--max-restarts={restarts}",
            "-m", "fasttrain.train.rank", str(directory.absolute()),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(torchrun, stdin=subprocess.PIPE, stderr=stderr, env=environment,
                                 start_new_session=True)
        try:
            code = child.wait()
        except BaseException:
            _end(child)
            raise
        finally:
            assert child.stdin is not None
            child.stdin.close()
            if sys.stdout.isatty():
                print("\x1b[?25h", end="", flush=True)  # a killed progress bar leaves the cursor hidden
        if code:
            raise RunFailed(f"{_reason(report, code)}; the processes' messages are in {errors}")
    if errors.stat().st_size == 0:
        errors.unlink()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End torchrun and so its processes; it kills those that do not end within 30 s."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait()
    except KeyboardInterrupt:  # a second Ctrl-C: the processes end when our end of their standard input closes
        child.kill()
        child.wait()
        raise


def _reason(report: Path, code: int) -> str:
    """The first cause among the failures that torchrun saw: a lost connection is only the echo of another failure."""
    if not report.exists():
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        return f"torchrun {how}"
    failures = json.loads(report.read_text())
    failures.sort(key=lambda f: (_echo(f), f["rank"]))
    first = failures[0]
    if first["message"].startswith("PeerFailed: "):  # the rank that it names ran on another machine
        return first["message"].removeprefix("PeerFailed: ")
    if first["exitcode"] < 0:
        name = signal.Signals(-first["exitcode"]).name
        hint = " (out of memory, or ended by somebody)" if name == "SIGKILL" else ""
        return f"rank {first['rank']} was killed by {name}{hint}"
    return f"rank {first['rank']} failed: {first['message'] or 'exit code ' + str(first['exitcode'])}"


def _echo(failure: dict[str, Any]) -> int:
    """How far from the cause: 0 the cause; 1 who names it; 2 who only lost a connection; 3 who was told to end."""
    if failure["message"].startswith("PeerFailed: "):
        return 1
    return 2 if failure["message"].startswith("WireError") else 3 * (failure["exitcode"] in STOPPED)


def main(arguments: list[str]) -> int:
    """torchrun itself, with its report of failures written as JSON to the path in ``arguments[0]``."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(arguments[1:])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        failures: list[dict[str, Any]] = [
            {"rank": rank, "exitcode": f.exitcode, "message": _message(f.error_file_data)}
            for rank, f in error.failures.items()
        ]
        Path(arguments[0]).write_text(json.dumps(failures))
        return 1
    return 0


def _message(data: dict[str, Any]) -> str:
    """The exception in a rank's error file, or nothing if it left none."""
    message = data.get("message", "")
    return message["message"] if isinstance(message, dict) else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
