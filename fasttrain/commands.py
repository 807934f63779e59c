"""The smaller subcommands of ``fasttrain``: their options, and what they do. `run` returns the exit code."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from fasttrain.train.config import BadInput


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Make token files of text files. If it is stopped, the same command goes on."""

    inputs: Annotated[Positional[tuple[Path, ...]], arg(metavar="INPUT...")]
    """Text files, each a document, and directories, all of whose files are."""
    out: Path
    """A new or empty directory, or one in which the same command was stopped."""
    tokenizer: str = "bytes"
    """bytes, or a file of Hugging Face's tokenizers (tokenizer.json)."""
    end_token: str | None = None
    """Ends every document. Without it: a usual one that the tokenizer has; bytes end with 0."""
    held_out: float = 0.03
    """Share of the documents for validation, chosen by hash; 0 for none."""
    split_by: Literal["path", "content"] = "path"
    """What is hashed: each document's path, or what is in it, so that equal ones stay together."""
    shard_mb: int = 64
    """A token file is closed when so many MiB of text are in it."""
    processes: int | None = None
    """How many work. Without it: one on each processor."""

    def run(self) -> int:
        """Make the token files, and say what there is."""
        from fasttrain.data.errors import DataError, WorkerDied
        from fasttrain.data.make import tokenize

        try:
            index = tokenize(**vars(self))
        except DataError as error:
            raise BadInput(str(error)) from error
        except WorkerDied as error:
            return say(f"{error}; the same command goes on", 1)
        for name, split in index["splits"].items():
            print(f"{name}: {split['tokens']:,} tokens of {split['documents']:,} documents in "
                  f"{len(split['shards'])} files")
        if index["left_out"] or index["empty"]:
            print(f"left out: {index['left_out']:,} files that are not text, {index['empty']:,} that are empty")
        print(f"written: {self.out}")
        return 0


@dataclasses.dataclass(frozen=True)
class Compare:
    """Lay two runs side by side: options that differ, losses, speed, and where the time of a step goes."""

    first: Annotated[Positional[Path], arg(metavar="FIRST")]
    """The directory of a run."""
    second: Annotated[Positional[Path], arg(metavar="SECOND")]
    """The directory of another."""
    png: Path | None = None
    """Also draw both loss curves here."""

    def run(self) -> int:
        """Print the comparison, and draw it if asked."""
        from fasttrain.train import compare, report

        print(compare.compare(self.first, self.second))
        if self.png:
            try:
                report.draw([report.read(self.first), report.read(self.second)], self.png)
            except OSError as error:
                raise BadInput(f"--png {self.png}: cannot be written: {error.strerror}") from error
        return 0


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page, which needs no other file, with the numbers and curves of one or more runs."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...")]
    """Directories of runs, finished or not."""
    out: Path = Path("report.html")
    """Where to."""

    def run(self) -> int:
        """Write the page."""
        if not self.runs:
            raise BadInput("no run: name the directories of one or more")
        from fasttrain.train import page, report

        runs = [report.read(directory) for directory in self.runs]
        try:
            page.write(runs, self.out)
        except OSError as error:
            raise BadInput(f"--out {self.out}: cannot be written: {error.strerror}") from error
        print(f"written: {self.out}")
        return 0


@dataclasses.dataclass(frozen=True)
class DrawSchedule:
    """Draw a schedule, as "warmup(100) + cosine(1000, floor=0.1)", and say its values."""

    text: Annotated[Positional[str], arg(metavar="SCHEDULE")]
    """Functions of fasttrain.schedules, joined with + and multiplied with *."""
    steps: int | None = None
    """How many to draw. Without it: its length, or 1000."""
    png: Path | None = None
    """Also draw it here."""

    def run(self) -> int:
        """Print the curve, and draw it if asked."""
        from fasttrain.schedules import draw, parse

        if self.steps is not None and self.steps < 1:
            raise BadInput(f"--steps {self.steps}: must be at least 1")
        try:
            schedule = parse(self.text)
            last = draw.steps_of(schedule, self.steps)
            said = [repr(schedule), draw.as_text(schedule, self.steps), "; ".join(
                f"step {step}: {schedule(step):.6g}" for step in dict.fromkeys((0, last // 4, last // 2, last)))]
            if self.png:
                draw.as_png(schedule, self.png, self.steps)
        except ValueError as error:
            raise BadInput(str(error)) from error
        except OverflowError as error:
            raise BadInput(f"{self.text} becomes too large for a number") from error
        except OSError as error:
            raise BadInput(f"--png {self.png}: cannot be written: {error.strerror}") from error
        print("\n".join(said))
        return 0


@dataclasses.dataclass(frozen=True)
class Verify:
    """Compare every byte of checkpoints, or of token files, with their checksums, and name what is damaged."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """Of one checkpoint, of several, or of token files."""

    def run(self) -> int:
        """Print what is damaged."""
        if (self.directory / "dataset.json").exists():
            return self._tell(self._damage_of_tokens())
        from fasttrain.checkpoint import files

        try:
            damages = files.verify(self.directory, lambda path: print(f"verifying {path}", flush=True))
        except files.NotACheckpoint as error:
            raise BadInput(str(error)) from error
        except files.CheckpointError as error:
            return say(str(error), 1)
        return self._tell(damages)

    def _damage_of_tokens(self) -> list[Any]:
        from fasttrain.data.dataset import TokenDataset, read_index
        from fasttrain.data.errors import DataError

        try:
            splits = read_index(self.directory)["splits"]
            return [damage for split in splits
                    for damage in TokenDataset(self.directory, split, on_bad="skip").damage()]
        except DataError as error:
            return [error]

    def _tell(self, damages: Sequence[Any]) -> int:
        for damage in damages:
            print(f"damaged: {damage}")
        print(f"{len(damages)} damaged" if damages else "all bytes are those that were written")
        return 1 if damages else 0


@dataclasses.dataclass(frozen=True)
class Inspect:
    """List what a checkpoint holds, or which checkpoints a directory does."""

    directory: Annotated[Positional[Path], arg(metavar="DIR")]
    """Of one checkpoint, or of several."""

    def run(self) -> int:
        """Print it."""
        from fasttrain.checkpoint import files

        try:
            print(files.inspect(self.directory))
        except files.NotACheckpoint as error:
            raise BadInput(str(error)) from error
        except files.CheckpointError as error:
            return say(str(error), 1)
        return 0


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train, kill a second run in the middle of a save, go on, and prove that both end in the same bits. A minute."""

    out: Path | None = None
    """Keep both runs in this new directory. Without it: nothing stays."""
    processes: int = 2
    """Of each run."""

    def run(self) -> int:
        """Say what happens, and whether all is equal."""
        from fasttrain.train.demo import demo
        from fasttrain.train.launch import RunFailed

        try:
            return 0 if demo(self.out, self.processes, lambda line: print(line, flush=True)) else 1
        except RunFailed as error:
            return say(str(error), 1)


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what is installed, which backend each kernel would use, and why not the others."""

    def run(self) -> int:
        """Say it."""
        from fasttrain import doctor

        return doctor.main()


def say(text: str, code: int) -> int:
    """Print a line of our own to standard error, and return the exit code."""
    print(f"fasttrain: {text}", file=sys.stderr)
    return code
