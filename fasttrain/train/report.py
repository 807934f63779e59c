"""What a run leaves behind, and how it is read: the directory, the summary and the picture."""

from __future__ import annotations

import json
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from fasttrain import __version__
from fasttrain.data.dataset import TokenDataset
from fasttrain.train.config import ASKED, BadInput, TrainConfig
from fasttrain.train.console import sent
from fasttrain.train.journal import Record, in_use, records
from fasttrain.train.source import Extent, Source
from fasttrain.train.tokens import cut


def make_directory(out: Path | None, optimizer: str) -> Path:
    """Make the directory of a run: `out`, which must be new or empty, or ``runs/OPTIMIZER-NUMBER`` with a new number.

    Raises:
        BadInput: it holds something, or cannot be made or written.
    """
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            if any(path.name != FRESH for path in out.iterdir()):  # a command that was killed may have left that
                raise BadInput(f"--out {out} is not empty; give a new directory, remove what is there, or go on with "
                               "the run in it by --resume auto")
        else:
            number = 1
            while True:
                out = Path("runs", f"{optimizer}-{number}")
                try:
                    out.mkdir(parents=True)
                    break
                except FileExistsError:
                    number += 1
        probe = out / FRESH
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}; give another directory") from error
    return out


def header(config: TrainConfig, read: Source) -> Record:
    """What ``config.json`` holds: options, versions, and which text or tokens."""
    return {
        "versions": {"fasttrain": __version__, "torch": metadata.version("torch"), "python": sys.version.split()[0]},
        "config": config.as_json(),
        "text": read.about(),
    }


ENDING_S = 5.0  # that processes of a command that was killed may take to end
FRESH = ".config.json"
FREE = ("processes", "text", "tokens", "out", "resume", "max_restarts", "threads", "log_every", "save_every", "keep",
        # how the work is divided, which changes numbers by the rounding of sums only
        "tensor", "sequence_parallel", "pipeline", "stages", "pipeline_schedule", "expert", "context", "copies", "zero",
        "accumulate", "recompute")


def begin(config: TrainConfig, header: Record) -> Path:
    """Make the directory of a run, with its ``config.json``; or, by `--resume auto`, find that of a run to go on with.

    Raises:
        BadInput: as `make_directory`, or as `check_same`.
    """
    found = resumable(config, header) if config.resume == "auto" and not config.dry_run else None
    if config.dry_run:
        out = Path(tempfile.mkdtemp(prefix="fasttrain-dry-run-"))
    else:
        out = found or make_directory(config.out, config.optimizer)
    fresh = out / FRESH  # of a run that goes on: options that do not change its numbers may be others now
    try:
        fresh.write_text(json.dumps(header, indent=1) + "\n")
        fresh.replace(out / "config.json")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from error
    return out


def resumable(config: TrainConfig, header: Record) -> Path | None:
    """The directory of a run that `--resume auto` goes on with: `out`, or the newest in ``runs`` that is not finished.

    Raises:
        BadInput: as `check_same`, where `out` was given.
    """
    if config.out is not None:
        if not (config.out / "config.json").exists():
            return None
        check_same(config.out, header)
        return config.out
    for directory in sorted(Path("runs").glob(f"{config.optimizer}-*"), key=lambda run: _number(run), reverse=True):
        if (directory / "config.json").exists() and not (directory / "summary.json").exists():
            try:
                check_same(directory, header)
            except BadInput:
                continue  # of other options: not the one that is meant
            return directory
    return None


def _number(run: Path) -> int:
    last = run.name.rpartition("-")[2]
    return int(last) if last.isdecimal() else 0


def check_same(directory: Path, header: Record) -> None:
    """Refuse to go on in a directory if the run in it is another one. How the work is divided may have changed.

    Raises:
        BadInput: it has other options or another text, is still going on, or cannot be read.
    """
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text())
        found["config"].get, found["text"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not what fasttrain train has written ({error!r}); give a new directory") from error
    if in_use(directory / "log.jsonl", patience_s=ENDING_S):
        raise BadInput(f"--out {directory}: its run is still going on; end it first, or give a new directory")
    defaults = TrainConfig().as_json()  # an older run did not know of options that came later
    for name, value in header["config"].items():
        if name not in FREE and (there := found["config"].get(name, defaults[name])) != value:
            raise BadInput(f"--out {directory} holds a run with --{name.replace('_', '-')} {there}, not {value}; a run "
                           "that is started again needs its own options, a new one a new directory")
    if found["text"]["sha256"] != header["text"]["sha256"]:
        raise BadInput(f"--out {directory} holds a run on another text; give a new directory")


def stopped(directory: Path) -> str | None:
    """What to say of a run that was asked to stop, and did; None of one that came to its end."""
    found = records(directory / "log.jsonl") if (directory / "log.jsonl").exists() else []
    if not found:
        return None
    last = found[-1]
    if last["event"] != "end" or last["text"] != ASKED:
        return None
    return (f"asked to stop, after step {last['step']}, which is saved; the same command with --resume auto and "
            f"--out {directory} goes on")


def conclude(directory: Path, held_out: np.ndarray | TokenDataset, wall_s: float) -> str:
    """Draw and sum up a complete run, and return what to say of it; of a dry run, which is removed, what it found."""
    if (config := TrainConfig.from_json(json.loads((directory / "config.json").read_text())["config"])).dry_run:
        found = records(directory / "log.jsonl")[-1]
        shutil.rmtree(directory)
        from fasttrain.train.dry import describe as describe_dry_run  # torch, which a summary does not need

        return describe_dry_run(found, config)
    run = read(directory)
    draw([run], directory / "run.png")
    summary = summarise(run, held_out, wall_s)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return f"{describe(summary, run.header)}\nwritten: {', '.join(sorted(str(p) for p in directory.iterdir()))}"


@dataclass(frozen=True)
class Run:
    """A finished or unfinished run, as its directory tells it."""

    directory: Path
    header: Record
    train: list[Record]
    validation: list[Record]
    wire: list[Record]

    @property
    def config(self) -> Record:
        return self.header["config"]

    @property
    def final(self) -> Record | None:
        """The validation over the whole held-out text that ends a complete run."""
        last = self.validation[-1] if self.validation else None
        return last if last and (last.get("whole") or last["step"] == self.config["steps"]) else None

    @property
    def unit(self) -> str:
        """What the bits of its validations are per: "byte" or "token"."""
        return Extent.of(self.header["text"]).unit

    def bits(self, validation: Record) -> float:
        """The bits per `unit` of one of its validations."""
        return validation[f"bits_per_{self.unit}"]


def read(directory: Path) -> Run:
    """Read a run.

    Raises:
        BadInput: the directory is no run, or one that never wrote a step.
    """
    try:
        header = json.loads((directory / "config.json").read_text())
        found = records(directory / "log.jsonl")
        header["config"], header["text"]
    except OSError as error:
        raise BadInput(f"{directory} is not a run: {error.filename}: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(f"{directory} is not a run of fasttrain train: {error!r}") from error
    run = Run(directory, header, *([r for r in found if r["event"] == e] for e in ("train", "validation", "wire")))
    if not run.train:
        raise BadInput(f"{directory} is a run that ended before its first line of log")
    return run


def baselines(stream: np.ndarray) -> dict[str, float]:
    """Bits per byte of the held-out text for methods that see nothing else: each reads exactly `stream`.

    `order0` is the entropy of the text's own byte frequencies, a bound for any code that looks at one byte at a time.

    Example:
        >>> baselines(np.frombuffer(b"ab" * 500, dtype=np.uint8))["order0"]
        1.0
    """
    data = stream.tobytes()
    counts = np.bincount(stream, minlength=256)
    p = counts[counts > 0] / len(stream)
    return {
        "order0": float(-(p * np.log2(p)).sum()),
        "zlib -9": 8 * len(zlib.compress(data, 9)) / len(data),
        "xz -9e": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }


def summarise(run: Run, stream: np.ndarray | TokenDataset, wall_s: float) -> Record:
    """The numbers of a complete run. `stream` is its held-out text; `wall_s` the seconds from start to end.

    Of tokens that are not bytes there are no baselines.
    """
    assert run.final is not None
    extent = Extent.of(run.header["text"])
    tokens = run.config["steps"] * run.config["batch"] * run.config["sequence"]
    return {
        "optimizer": run.config["optimizer"],
        f"validation_bits_per_{run.unit}": run.bits(run.final),
        **({"baselines_bits_per_byte": baselines(cut(stream, np.array([0]), len(stream))[0])}
           if run.unit == "byte" else {}),
        "train_loss": run.train[-1]["loss"],
        "steps": run.config["steps"],
        "tokens": tokens,
        "passes_over_text": tokens / extent.train,
        "tokens_per_s": median_speed(run),
        "share": mean_shares(run),
        "wire": {name: run.wire[-1][name] for name in ("bytes", "formula", "exposed_s")} if run.wire else None,
        "wall_s": wall_s,
    }


def median_speed(run: Run) -> float:
    """Median of the tokens/s of the run's lines."""
    return float(np.median([r["tokens_per_s"] for r in run.train]))


def mean_shares(run: Run) -> dict[str, float]:
    """Each phase's share of the time in steps, averaged over the run's lines."""
    phases = dict.fromkeys(phase for r in run.train for phase in r["share"])  # a save is in some lines only
    return {phase: float(np.mean([r["share"].get(phase, 0.0) for r in run.train])) for phase in phases}


def describe(summary: Record, header: Record) -> str:
    """The summary as text for a terminal."""
    t = Extent.of(header["text"])
    bits = {f"this model, {summary['optimizer']}": summary[f"validation_bits_per_{t.unit}"]}
    bits |= {"order-0 entropy" if k == "order0" else k: v
             for k, v in summary.get("baselines_bits_per_byte", {}).items()}
    rows = [f"  {name:<28}{value:.3f}" for name, value in bits.items()]
    shares = ", ".join(f"{phase.replace('_', '-')} {share:.1%}" for phase, share in summary["share"].items())
    return "\n".join([
        f"bits per {t.unit} of {t.held_out_wholes} held-out {t.whole} ({t.held_out:,} {t.unit}s); "
        f"trained on {t.train_wholes} others ({t.train:,} {t.unit}s):",
        *rows,
        f"{summary['steps']} steps, {summary['tokens']:,} {t.unit}s read ({summary['passes_over_text']:.2f} passes), "
        f"{summary['tokens_per_s']:,.0f} tokens/s, {summary['wall_s']:.0f} s in all",
        f"time in steps: {shares}",
        *([f"communication of a process: {sent(summary['wire'])}"] if summary["wire"] else []),
    ])


def bits_per(runs: Sequence[Run]) -> str:
    """What the bits of these runs are per, for a title."""
    return "bits per " + " or ".join(sorted({run.unit for run in runs}))


def draw(runs: list[Run], path: Path) -> None:
    """Draw training and validation loss of one or more runs, in bits per byte or token, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=bits_per(runs))
    for i, run in enumerate(runs):
        label = f"{run.config['optimizer']} " if len(runs) == 1 else f"{run.directory.name} "
        axes.plot([r["step"] for r in run.train], [r["loss"] / np.log(2) for r in run.train], color=f"C{2 * i}",
                  linewidth=1, label=label + "training")
        axes.plot([r["step"] for r in run.validation], [run.bits(r) for r in run.validation],
                  "o-", color=f"C{2 * i + 1}", markersize=4, label=label + "validation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
