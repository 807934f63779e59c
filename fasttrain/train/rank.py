"""One process of a run: started by our own command (`launched`), or by torchrun from outside (`join`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fasttrain.dist import attempt
from fasttrain.dist.failures import FAILED, INTERRUPTED, PEER_FAILED, PeerFailed, end_process
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire, WireError
from fasttrain.train import recipe, report, text
from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.console import Console
from fasttrain.train.division import callable_of, divide, wire_of
from fasttrain.train.loop import Record, train
from fasttrain.train.meeting import meet
from fasttrain.train.model import GPT
from fasttrain.train.place import Place, place
from fasttrain.train.text import Text

BAD_INPUT = 2


def work(config: TrainConfig, here: Place, begin: Callable[[Wire], tuple[Text, Path]]) -> tuple[Text, Path]:
    """Everything that a rank does, from meeting the others to the last record of the loop.

    Args:
        begin: what it does with the others before: it returns the text, and the directory of the run, which exists on
            the first rank's host.

    Returns:
        What `begin` did.
    """
    device = settle(config, here)
    wire = Wire(device)
    wire.watch = watcher = Watcher()
    watcher.catch_sigterm(on_stop=lambda: end_process(128 + signal.SIGTERM))
    with watcher.guard(), contextlib.ExitStack() as stack:
        read, directory = begin(wire)
        model = GPT(config.layers, config.width, config.heads, config.sequence, config.ngrams, config.rows).to(device)
        parallel = divide(config, model, wire)
        optimizer = recipe.build(config, callable_of(parallel))
        emit = _nothing
        if wire.rank == 0:
            first = 0  # the step from which a process that was started again goes on
            restarts = attempt.current() - 1
            log = stack.enter_context(report.open_log(directory, first if restarts else None))
            console = stack.enter_context(Console(config.steps))

            def emit(record: Record) -> None:
                log.write(json.dumps(record) + "\n")
                console.show(record)

            if restarts:
                emit({"event": "restart", "step": first, "number": restarts})
        train(config, parallel, optimizer, read, emit)
    watcher.close()
    if wire_of(parallel) is not wire:
        wire_of(parallel).close()
    wire.close()
    return read, directory


def settle(config: TrainConfig, here: Place) -> torch.device:
    """Settings of the whole process: threads, seed, the same bits each time. Returns its device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives the same bits twice only with this
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    # With it, deterministic mode writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)
    return device


def _nothing(record: Record) -> None:
    """What the other ranks do with a record."""


# --- Started by our own command: `fasttrain.train.launch` -------------------------------------------------------------


def launched(directory: Path, here: Place) -> None:
    """A rank of a run whose options lie in ``DIRECTORY/config.json``."""
    header = json.loads((directory / "config.json").read_text())
    config = TrainConfig.from_json(header["config"])

    def begin(wire: Wire) -> tuple[Text, Path]:
        read = text.load(config.text, config.held_out, config.sequence)
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

    def begin(wire: Wire) -> tuple[Text, Path]:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=end_with_torchrun, args=(parent, wire.watch), daemon=True).start()
        return meet(config, wire)

    with told(here.rank):
        read, directory = work(config, here, begin)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if here.rank == 0:
            print(report.conclude(directory, read.held_out, time.perf_counter() - begun))


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
        if isinstance(error, (BadInput, PeerFailed)):
            print(f"fasttrain: rank {rank}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        if isinstance(error, WireError):
            time.sleep(1)  # torchrun polls: let it see first the peer whose end caused this
        # An ordinary exit would wait for collectives that never end.
        end_process(BAD_INPUT if isinstance(error, BadInput) else
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
