"""The ``fasttrain`` command: ``train``, ``compare``, ``schedule``, ``doctor``.

Exit codes: 0 done; 1 a run failed; 2 the input cannot work; 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg, subcommand

from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.options import config_argument, from_file
from fasttrain.train.place import Place, place


@dataclasses.dataclass(frozen=True)
class Compare:
    """Lay two runs side by side: options that differ, losses, speed, and where the time of a step goes."""

    first: Annotated[Positional[Path], arg(metavar="FIRST")]
    """The directory of a run."""
    second: Annotated[Positional[Path], arg(metavar="SECOND")]
    """The directory of another."""
    png: Path | None = None
    """Also draw both loss curves here."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page, which needs no other file, with the numbers and curves of one or more runs."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...")]
    """Directories of runs, finished or not."""
    out: Path = Path("report.html")
    """Where to."""


@dataclasses.dataclass(frozen=True)
class DrawSchedule:
    """Draw a schedule, as "warmup(100) + cosine(1000, floor=0.1)", and say its values."""

    text: Annotated[Positional[str], arg(metavar="SCHEDULE")]
    """Functions of fasttrain.schedules, joined with + and multiplied with *."""
    steps: int | None = None
    """How many to draw. Without it: its length, or 1000."""
    png: Path | None = None
    """Also draw it here."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what is installed, which backend each kernel would use, and why not the others."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        here = place() if arguments[:1] == ["train"] else None
        command = parse(arguments, here)
        if isinstance(command, TrainConfig):
            return train(command, here)
        if isinstance(command, Compare):
            return compare(command)
        if isinstance(command, Report):
            return write_report(command)
        if isinstance(command, DrawSchedule):
            return draw_schedule(command)
        from fasttrain import doctor

        return doctor.main()
    except BadInput as error:
        return _say(str(error), 2)
    except KeyboardInterrupt as error:
        return _say("interrupted", error.args[0] if error.args else 130)


def parse(arguments: list[str], here: Place | None = None) -> TrainConfig | Compare | Report | DrawSchedule | Doctor:
    """The command that `arguments` name. By default it trains in two processes, or in those that torchrun has started.

    Raises:
        BadInput: they name none. tyro explains that in a box of several lines; this is the first of them.
    """
    file = config_argument(arguments) if arguments[:1] == ["train"] else None
    defaults = TrainConfig() if file is None else from_file(file)
    if here is not None and file is None:
        defaults = TrainConfig(processes=here.world)
    commands = (
        Annotated[TrainConfig, subcommand("train", default=defaults)]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Report, subcommand("report")]
        | Annotated[DrawSchedule, subcommand("schedule")]
        | Annotated[Doctor, subcommand("doctor")]
    )
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
    from fasttrain.train import recipe, report, text

    if here is not None:
        config.check_started_by_torchrun(here.world, here.most_restarts)
    config.check(None if here is None else here.here)
    recipe.check(config)
    if here is not None:
        from fasttrain.train import rank

        rank.join(config, here)
        return 0
    from fasttrain.train.launch import RunFailed, launch

    read = text.load(config.text, config.held_out, config.sequence)
    out = report.begin(config, report.header(config, read))
    print(f"{config.processes} processes on {config.device}, {config.optimizer}; writing to {out}", flush=True)
    try:
        launch(out, config.processes, config.threads, config.max_restarts)
    except RunFailed as error:
        return _say(str(error), 1)
    if (said := report.stopped(out)) is not None:
        return _say(said, 143)
    print(report.conclude(out, read.held_out, time.perf_counter() - begun))
    return 0


def compare(command: Compare) -> int:
    """Print the comparison, and draw it if asked."""
    from fasttrain.train import compare as comparison
    from fasttrain.train import report

    print(comparison.compare(command.first, command.second))
    if command.png:
        try:
            report.draw([report.read(command.first), report.read(command.second)], command.png)
        except OSError as error:
            raise BadInput(f"--png {command.png}: cannot be written: {error.strerror}") from error
    return 0


def write_report(command: Report) -> int:
    """Write the page."""
    from fasttrain.train import page, report

    runs = [report.read(directory) for directory in command.runs]
    try:
        page.write(runs, command.out)
    except OSError as error:
        raise BadInput(f"--out {command.out}: cannot be written: {error.strerror}") from error
    print(f"written: {command.out}")
    return 0


def draw_schedule(command: DrawSchedule) -> int:
    """Print the curve, and draw it if asked."""
    from fasttrain.schedules import draw
    from fasttrain.schedules import parse as parse_schedule

    if command.steps is not None and command.steps < 1:
        raise BadInput(f"--steps {command.steps}: must be at least 1")
    try:
        schedule = parse_schedule(command.text)
        last = draw.steps_of(schedule, command.steps)
        said = [repr(schedule), draw.as_text(schedule, command.steps), "; ".join(
            f"step {step}: {schedule(step):.6g}" for step in dict.fromkeys((0, last // 4, last // 2, last)))]
        if command.png:
            draw.as_png(schedule, command.png, command.steps)
    except ValueError as error:
        raise BadInput(str(error)) from error
    except OverflowError as error:
        raise BadInput(f"{command.text} becomes too large for a number") from error
    except OSError as error:
        raise BadInput(f"--png {command.png}: cannot be written: {error.strerror}") from error
    print("\n".join(said))
    return 0


def _say(text: str, code: int) -> int:
    print(f"fasttrain: {text}", file=sys.stderr)
    return code


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)
