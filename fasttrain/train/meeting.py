"""What processes that torchrun has started elsewhere settle before they train: the same job, and where it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasttrain.dist import attempt
from fasttrain.dist.wire import Wire
from fasttrain.train import report, source
from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.source import Extent, Source

OF_A_HOST = ("text", "tokens", "out")  # where the text lies may differ, what it says not; only the first rank writes


def meet(config: TrainConfig, wire: Wire) -> tuple[Source, Path]:
    """Load text or tokens on every rank, compare what all are about to do, and have the first one make the directory.

    When all have been started again it goes on in the directory that is there.

    A rank that raises here tells the others why (`fasttrain.dist.watcher`).

    Returns:
        The text or tokens, and the directory on the first rank's host, which others need not see.

    Raises:
        BadInput: the ranks differ in options, versions or text, with the same words on each, and nothing was written;
            or this rank has no text, or, the first one, nowhere to write.
    """
    read = source.load(config)
    header = report.header(config, read)
    difference([json.loads(said) for said in wire.gather_objects_json(json.dumps(description(header)))])
    directory = ""
    if wire.rank == 0:
        out = config.out
        if attempt.current() > 1 and out is not None and (out / "config.json").exists():
            report.check_same(out, header)
        else:
            out = report.begin(config, header)
        directory = str(out)
        print(f"{wire.size} processes on {config.device}, {config.optimizer}; writing to {out}", flush=True)
    return read, Path(wire.gather_objects_json(directory)[0])


def description(header: dict[str, Any]) -> dict[str, str]:
    """What has to be the same on every rank, by name."""
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in header["config"].items()
               if name not in OF_A_HOST}
    read, extent = header["text"], Extent.of(header["text"])
    return {**options, "torch": header["versions"]["torch"], "fasttrain": header["versions"]["fasttrain"],
            "the text": f"{extent.train + extent.held_out:,} {extent.unit}s in "
                        f"{extent.train_wholes + extent.held_out_wholes} {extent.whole}, sha256 {read['sha256'][:16]}"}


def difference(told: list[dict[str, str]]) -> None:
    """Raise BadInput if ranks do not tell the same as the first.

    Example:
        >>> difference([{"--steps": "5"}, {"--steps": "5"}])
    """
    for rank, mine in enumerate(told):
        for name, value in told[0].items():
            if mine.get(name) != value:
                raise BadInput(f"the processes were not started alike: {name} is {mine.get(name)} on rank {rank} and "
                               f"{value} on rank 0; give every host the same command and the same text")
