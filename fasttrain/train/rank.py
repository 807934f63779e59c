"""One process of a run: started by our own command (`launched`), or by torchrun from outside (`join`)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fasttrain.checkpoint.stopping import Stopping
from fasttrain.data.errors import DataError
from fasttrain.dist import attempt
from fasttrain.dist.failures import FAILED, INTERRUPTED, PEER_FAILED, PeerFailed, end_process
from fasttrain.dist.mesh import Mesh
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire, WireError
from fasttrain.train import recipe, report, source
from fasttrain.train.config import ASKED, PROFILED, BadInput, TrainConfig
from fasttrain.train.division import divide
from fasttrain.train.loop import train
from fasttrain.train.meeting import meet
from fasttrain.train.place import Place, place
from fasttrain.train.profiling import Profile
from fasttrain.train.source import Source
from fasttrain.train.telling import telling

BAD_INPUT = 2


def work(config: TrainConfig, here: Place, begin: Callable[[Wire], tuple[Source, Path]]) -> Ended:
    """Everything that a rank does, from meeting the others to the last record of the loop.

    Args:
        begin: what it does with the others before: it returns the text or tokens, and the directory of the run, which
            exists on the first rank's host.

    Returns:
        How it ended.
    """
    device = settle(config, here)
    wire = Wire(device)
    wire.watch = watcher = Watcher()
    watcher.catch_sigterm(on_stop=lambda: end_process(128 + signal.SIGTERM))
    with watcher.guard(), contextlib.ExitStack() as stack:
        read, directory = begin(wire)
        mesh = Mesh(**config.axes, device=device, timeout_s=wire.timeout_s, watch=watcher)
        divided = divide(config, mesh, read.vocabulary)
        optimizer = recipe.build(config, divided.called)
        restarts = attempt.current() - 1
        log = directory / "log.jsonl"
        again = restarts > 0 or (log.exists() and log.stat().st_size > 0)
        tell = stack.enter_context(telling(config, directory, wire.rank == 0, restarts))
        profile = None
        if config.profile and wire.rank == 0:
            (directory / "profile").mkdir(exist_ok=True)
            profile = stack.enter_context(Profile(directory / "profile", device=device))
        stopping = stack.enter_context(Stopping(wire))
        ended = train(config, divided, optimizer, read, tell, directory, again, stopping, profile)
        if profile is not None and profile.text is not None:
            tell({"event": "profile", "step": PROFILED, "text": profile.text})
    watcher.close()
    mesh.close()
    wire.close()
    return Ended(read, directory, ended, stopping.exit_code if ended == ASKED else 0)


class Ended(NamedTuple):
    """Attributes:
        text, directory: what `begin` gave.
        reason: why the loop ended.
        exit_code: with which the process should.
    """

    text: Source
    directory: Path
    reason: str
    exit_code: int


def settle(config: TrainConfig, here: Place) -> torch.device:
    """Settings of the whole process: threads, seed, the same bits each time. Returns its device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives the same bits twice only with this
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.use_deterministic_algorithms(True)
    # With it, deterministic mode writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    return device


# --- Started by our own command: `fasttrain.train.launch` -------------------------------------------------------------


def launched(directory: Path, here: Place) -> None:
    """A rank of a run whose options lie in ``DIRECTORY/config.json``."""
    header = json.loads((directory / "config.json").read_text())
    config = TrainConfig.from_json(header["config"])

    def begin(wire: Wire) -> tuple[Source, Path]:
        read = source.load(config)
        if read.sha256 != header["text"]["sha256"]:
            raise RuntimeError("the text has changed since the run was started; start it again")
        return read, directory

    work(config, here, begin)


def end_with_parent() -> None:
    """End this process when standard input closes.

    The command holds the other end of that pipe and never writes to it: however it ends, no process is left behind.
    """
    os.read(0, 1)
    os._exit(1)


# --- Started by torchrun, with the options of `fasttrain train` -------------------------------------------------------


def join(config: TrainConfig, here: Place) -> None:
    """A rank of a run that somebody has started with torchrun; the first one writes everything.

    It ends this process if it fails, after one line of standard error, or a traceback if the reason is not known.
    """
    begun, parent = time.perf_counter(), os.getppid()

    def begin(wire: Wire) -> tuple[Source, Path]:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=end_with_torchrun, args=(parent, wire.watch), daemon=True).start()
        return meet(config, wire)

    with told(here.rank):
        ended = work(config, here, begin)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if here.rank == 0 and ended.reason == ASKED:
            print(f"fasttrain: {report.stopped(ended.directory)}", file=sys.stderr)
        elif here.rank == 0:
            print(report.conclude(ended.directory, ended.text.held_out, time.perf_counter() - begun))
        if ended.exit_code:
            sys.exit(ended.exit_code)


def end_with_torchrun(parent: int, watcher: Watcher) -> None:
    """End this process, and so the job, when torchrun is gone: killed, it leaves its processes behind."""
    while os.getppid() == parent:
        time.sleep(0.5)
    cause = "torchrun has ended on its host without ending it"
    print(f"fasttrain: {cause}", file=sys.stderr)
    end_process(watcher.fail(cause))


@contextlib.contextmanager
def told(rank: int) -> Iterator[None]:
    """End this process if what is within fails, and leave the reason for torchrun's report."""
    try:
        yield
    except KeyboardInterrupt as error:  # of the command's handler of SIGTERM: with a code of its own
        end_process(error.args[0] if error.args else INTERRUPTED)
    except Exception as error:
        get_error_handler().record_exception(error)
        if isinstance(error, (BadInput, DataError, PeerFailed)):
            print(f"fasttrain: rank {rank}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        if isinstance(error, WireError):
            time.sleep(1)  # torchrun polls: let it see first the peer whose end caused this
        # An ordinary exit would wait for collectives that never end.
        end_process(BAD_INPUT if isinstance(error, (BadInput, DataError)) else
                    PEER_FAILED if isinstance(error, PeerFailed) else FAILED)


def main() -> None:
    """``python -m fasttrain.train.rank DIRECTORY``."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    here = place()
    assert here is not None
    with told(here.rank):
        launched(Path(sys.argv[1]), here)


if __name__ == "__main__":
    main()
