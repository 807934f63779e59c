"""The ``fasttrain`` command: ``train``, and what is in `fasttrain.commands`.

Exit codes: 0 done; 1 a run failed; 2 the input cannot work; 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from fasttrain.commands import Compare, Demo, Doctor, DrawSchedule, Inspect, Report, Tokenize, Verify, say
from fasttrain.plan.command import Plan
from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.options import config_argument, from_file
from fasttrain.train.place import Place, place

COMMANDS = (("tokenize", Tokenize), ("compare", Compare), ("report", Report), ("schedule", DrawSchedule),
            ("plan", Plan), ("verify", Verify), ("inspect", Inspect), ("demo", Demo),
            ("doctor", Doctor))
Command = Tokenize | Compare | Report | DrawSchedule | Plan | Verify | Inspect | Demo | Doctor


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        here = place() if arguments[:1] == ["train"] else None
        command = parse(arguments, here)
        if isinstance(command, TrainConfig):
            return train(command, here)
        return command.run()
    except BadInput as error:
        return say(str(error), 2)
    except KeyboardInterrupt as error:
        return say(error.args[1] if len(error.args) > 1 else "interrupted", error.args[0] if error.args else 130)


def parse(arguments: list[str], here: Place | None = None) -> TrainConfig | Command:
    """The command that `arguments` name. By default it trains in two processes, or in those that torchrun has started.

    Raises:
        BadInput: they name none. tyro explains that in a box of several lines; this is the first of them.
    """
    file = config_argument(arguments) if arguments[:1] == ["train"] else None
    defaults = TrainConfig() if file is None else from_file(file)
    if here is not None and file is None:
        defaults = TrainConfig(processes=here.world)
    commands: Any = Annotated[TrainConfig, subcommand("train", default=defaults)]
    for name, command in COMMANDS:
        commands |= Annotated[command, subcommand(name)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(commands, prog="fasttrain", args=arguments,
                            description="Fused optimizer steps and gradient buckets for training neural networks.")
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise BadInput(_first_section(said.getvalue())) from end


def _first_section(box: str) -> str:
    """The text of tyro's error box up to its first rule, and its guess of what was meant, in one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line.strip("─-"):
            sections[-1].append(line)
        elif line:
            sections.append([])
    if not box.startswith("╭") and len(sections) > 1:
        del sections[0]  # where the terminal is not UTF-8 the title is a section of its own
    said = " ".join(sections[0]).rstrip(".")
    for section in sections[1:]:
        if section and section[0].startswith("Perhaps you meant"):
            said += f"; perhaps you meant {section[1].split()[0]}"
    return f"{said}; see --help"


def train(config: TrainConfig, here: Place | None) -> int:
    """Check everything, run the processes, and report; or, where torchrun has started this one, be one of them."""
    begun = time.perf_counter()
    from fasttrain.train import checking, recipe, report, source

    if here is not None:
        config.check_started_by_torchrun(here.world, here.most_restarts)
    checking.check(config, None if here is None else here.here)
    recipe.check(config)
    if here is not None:
        from fasttrain.train import rank

        rank.join(config, here)
        return 0
    from fasttrain.train.launch import RunFailed, launch

    read = source.load(config)
    out = report.begin(config, report.header(config, read))
    print(f"{config.processes} processes on {config.device}, {config.optimizer}; writing to {out}", flush=True)
    try:
        launch(out, config.processes, config.threads, config.max_restarts)
    except RunFailed as error:
        return say(str(error), 1)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(error.args[0] if error.args else 130, report.stopped(out) or "interrupted") from error
    if (said := report.stopped(out)) is not None:
        return say(said, 143)
    print(report.conclude(out, read.held_out, time.perf_counter() - begun))
    return 0


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)
