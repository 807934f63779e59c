"""One process of a run: ``python -m fasttrain.train.rank DIRECTORY``, started by torchrun.

It finds its options in ``DIRECTORY/config.json``; rank 0 writes ``DIRECTORY/log.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fasttrain.dist.failures import FAILED, PEER_FAILED, PeerFailed, end_process
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire, WireError
from fasttrain.train import recipe, text
from fasttrain.train.config import TrainConfig
from fasttrain.train.console import Console
from fasttrain.train.division import callable_of, divide, wire_of
from fasttrain.train.loop import Record, train
from fasttrain.train.model import GPT


def run(directory: Path) -> None:
    """Everything this process does, from its options to the last record."""
    header = json.loads((directory / "config.json").read_text())
    config = TrainConfig.from_json(header["config"])
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    # With it, deterministic mode writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device("cpu")
    if config.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    read = text.load(config.text, config.held_out, config.sequence)
    if read.sha256 != header["text"]["sha256"]:
        raise RuntimeError("the text has changed since the run was started; start it again")

    wire = Wire(device)
    wire.watch = watcher = Watcher()
    watcher.catch_sigterm(on_stop=lambda: end_process(128 + signal.SIGTERM))
    with watcher.guard(), contextlib.ExitStack() as stack:
        model = GPT(config.layers, config.width, config.heads, config.sequence, config.ngrams, config.rows).to(device)
        parallel = divide(config, model, wire)
        optimizer = recipe.build(config, callable_of(parallel))
        emit = _nothing
        if wire.rank == 0:
            log = stack.enter_context(open(directory / "log.jsonl", "x", buffering=1))
            console = stack.enter_context(Console(config.steps))

            def emit(record: Record) -> None:
                log.write(json.dumps(record) + "\n")
                console.show(record)

        train(config, parallel, optimizer, read, emit)
    watcher.close()
    if wire_of(parallel) is not wire:
        wire_of(parallel).close()
    wire.close()


def _nothing(record: Record) -> None:
    """What the other ranks do with a record."""


def end_with_parent() -> None:
    """End this process when standard input closes.

    The command holds the other end of that pipe and never writes to it: however it ends, no process is left behind.
    """
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Run, and leave the reason for torchrun's report if that fails."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        run(Path(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        get_error_handler().record_exception(error)
        if isinstance(error, WireError):
            time.sleep(1)  # torchrun polls: let it see first the peer whose end caused this
        # An ordinary exit would wait for collectives that never end.
        end_process(PEER_FAILED if isinstance(error, PeerFailed) else FAILED)


if __name__ == "__main__":
    main()
