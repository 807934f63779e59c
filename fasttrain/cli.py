"""The ``fasttrain`` command: ``train``, ``compare``, ``verify``, ``inspect``, ``doctor``.

Exit codes: 0 done; 1 a run failed; 2 the input cannot work; 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg, subcommand

from fasttrain import __version__
from fasttrain.train.config import BadInput, TrainConfig


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
class Verify:
    """Compare every byte of a checkpoint, or of all in a directory, with its checksums, and name what is damaged."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """Of one checkpoint, or of several."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """List what a checkpoint holds, or which checkpoints a directory does."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """Of one checkpoint, or of several."""


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what is installed, which backend each kernel would use, and why not the others."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if isinstance(command, TrainConfig):
            return train(command)
        if isinstance(command, Compare):
            return compare(command)
        if isinstance(command, Verify | Inspect):
            return checkpoints(command)
        from fasttrain import doctor

        return doctor.main()
    except BadInput as error:
        return _say(str(error), 2)
    except KeyboardInterrupt as error:
        return _say("interrupted", error.args[0] if error.args else 130)


def parse(arguments: list[str]) -> TrainConfig | Compare | Verify | Inspect | Doctor:
    """The command that `arguments` name.

    Raises:
        BadInput: they name none. tyro explains that in a box of several lines; this is the first of them.
    """
    commands = (
        Annotated[TrainConfig, subcommand("train")]
        | Annotated[Compare, subcommand("compare")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Inspect, subcommand("inspect")]
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


def train(config: TrainConfig) -> int:
    """Check everything, run the processes, and report."""
    begun = time.perf_counter()
    from fasttrain.train import recipe, report, text
    from fasttrain.train.launch import RunFailed, launch

    config.check()
    recipe.check(config)
    read = text.load(config.text, config.held_out, config.sequence)
    out = report.make_directory(config.out, config.optimizer)
    header = {
        "versions": {"fasttrain": __version__, "torch": metadata.version("torch"), "python": sys.version.split()[0]},
        "config": config.as_json(),
        "text": {
            "train_bytes": len(read.train), "train_files": read.train_files,
            "held_out_bytes": len(read.held_out), "held_out_files": read.held_out_files, "sha256": read.sha256,
        },
    }
    (out / "config.json").write_text(json.dumps(header, indent=1) + "\n")
    print(f"{config.processes} processes on {config.device}, {config.optimizer}; writing to {out}", flush=True)
    try:
        launch(out, config.processes, config.threads)
    except RunFailed as error:
        return _say(str(error), 1)

    run = report.read(out)
    report.draw([run], out / "run.png")
    summary = report.summarise(run, read.held_out, time.perf_counter() - begun)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(report.describe(summary, header))
    print(f"written: {', '.join(sorted(str(p) for p in out.iterdir()))}")
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


def checkpoints(command: Verify | Inspect) -> int:
    """Print what is damaged, or what there is."""
    from fasttrain.checkpoint import files

    try:
        if isinstance(command, Inspect):
            print(files.inspect(command.directory))
            return 0
        damages = files.verify(command.directory, lambda path: print(f"verifying {path}", flush=True))
    except files.NotACheckpoint as error:
        raise BadInput(str(error)) from error
    except files.CheckpointError as error:
        return _say(str(error), 1)
    for damage in damages:
        print(f"damaged: {damage}")
    print(f"{len(damages)} damaged" if damages else "all bytes are those that were written")
    return 1 if damages else 0


def _say(text: str, code: int) -> int:
    print(f"fasttrain: {text}", file=sys.stderr)
    return code


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)
