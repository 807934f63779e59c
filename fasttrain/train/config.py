"""The options of ``fasttrain train``: one dataclass, checked before anything is started or written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

PROFILED = 13  # steps that --profile needs
ASKED = "asked to stop"  # why a run has ended that may go on


class BadInput(ValueError):
    """Something the user gave cannot work. The command line prints it as one line and ends with exit code 2."""


def usable_processors() -> int:
    """How many processors this process may run on, where the system says so; else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a small byte-level GPT and say how well it predicts text that it has not seen.

    Without options: the source of Python's standard library, two processes with one thread each, about two minutes.
    """

    text: Path | None = None
    """A file, or a directory whose text files are all read. Without it: Python's standard library."""
    tokens: Path | None = None
    """A directory that fasttrain tokenize wrote, to train on its tokens in the place of text."""
    out: Path | None = None
    """Where to write; a new or empty directory. Without it: runs/OPTIMIZER-NUMBER."""

    optimizer: str = "AdamW"
    """AdamW, SGD, Lion, ...: fasttrain.optim's. torch.AdamW, torch.SGD, ...: stock torch.optim."""
    lr: float | None = None
    """Highest learning rate. Without it: one that suits the optimizer."""
    weight_decay: float | None = None
    """Decay of the matrices (gains are never decayed). Without it: one that suits the optimizer."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all of the vocabulary, in training."""
    z_loss: float = 0.0
    """Factor of the squared logarithm of the softmax's denominator, added to the loss in training; 1e-4, say."""
    warmup: int | None = None
    """Steps in which the learning rate rises; it then falls to zero along a cosine. Without it: 50, or a tenth of the
    steps if that is fewer."""
    schedule: str | None = None
    """Another way of the learning rate, in shares of the highest: "warmup(50) + linear(950)", say; drawn by the
    command schedule."""

    steps: int = 1000
    """Optimizer steps."""
    batch: int = 16
    """Sequences in one step, over all processes together."""
    sequence: int = 128
    """Bytes, or tokens of --tokens, in one sequence."""
    layers: int = 4
    """Transformer blocks."""
    width: int = 128
    """Features of one position."""
    heads: int = 4
    """Attention heads; they divide the width."""
    ngrams: int = 4
    """Longest run of bytes with an embedding of its own; 1 embeds single bytes only."""
    rows: int = 8192
    """Rows of the embedding of each length of run; runs share them by hash."""

    processes: int = 2
    """Data-parallel processes. Under torchrun: as many as it has started."""
    max_restarts: int = 0
    """How often all processes are started again when one of them fails."""
    threads: int = 1
    """Threads in each process."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda gives each process one GPU and averages over NCCL; cpu averages over gloo."""
    wire: Literal["same", "ordered", "bf16", "int8"] = "same"
    """How gradients travel between processes: as they are, added in the order of ranks, in 16 bits, in 8 bits."""
    zero: Literal[0, 1, 2, 3] = 0
    """Divide the optimizer's states (1), the reduced gradients too (2), the parameters too (3), over the processes."""
    accumulate: int = 1
    """Backward passes of one step; only the last one communicates."""
    recompute: str | None = None
    """Activations that are computed again in backward, to save memory: full (all of each block), selective (all but
    products and attention), or 2, 3, ...: every so many blocks."""
    compile: bool = False
    """Compile each block with torch.compile."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-pure", "fp16-pure"] = "fp32"
    """bf16, fp16: the model computes in these, parameters stay fp32; pure: parameters have 16 bits too, and the
    optimizer keeps fp32 masters."""
    seed: int = 0
    """Of the initial weights and the order of the text. The same seed gives the same bits on the same machine."""

    held_out: float = 0.03
    """Share of the files (by hash of their paths) that is never trained on."""
    log_every: int = 10
    """Steps between two lines of the log."""
    validate_every: int = 100
    """Steps between two quick validations; the whole held-out text is read once, at the end."""
    ema: float | None = None
    """Validate with an exponential average of the weights, of this decay (0.999, say)."""
    patience: int = 0
    """Quick validations in a row that may be no better before the run ends early; 0: it does not."""
    spikes: int = 0
    """Losses in a row far above the others after which the run goes back to a checkpoint and leaves their batches out;
    0: they are only told."""
    max_skips: int = 10
    """Skipped steps in a row, for gradients that are not finite, that end the run."""

    config: Path | None = None
    """A TOML file with options, under the names that they have here; those of the command line go before it."""
    dry_run: bool = False
    """Make a few steps, say how much memory and time the whole run would take, and leave nothing behind."""
    profile: bool = False
    """Record steps 11 to 13 with torch's profiler: profile/trace.json in --out, and a table of where they went."""
    tensorboard: bool = False
    """Write every number for TensorBoard, too: tensorboard/ in --out."""

    resume: Literal["never", "auto"] = "never"
    """auto: go on with the run in --out (without it: the newest unfinished one of these options), if there is one."""
    save_every: int = 250
    """Steps between two checkpoints, beside which training goes on; 0: none are saved."""
    keep: int = 2
    """The newest checkpoints that stay, beside the best."""

    @property
    def rise(self) -> int:
        """Steps of the warmup."""
        return min(50, self.steps // 10) if self.warmup is None else self.warmup

    def check(self, here: int | None = None) -> None:
        """Refuse what cannot work. Imports torch only where the answer depends on it.

        Args:
            here: how many of the processes are on this machine; None: all.

        Raises:
            BadInput: names the option, what it was, and what to do.
        """
        for name in ("steps", "batch", "sequence", "layers", "width", "heads", "ngrams", "rows", "processes", "threads",
                     "accumulate", "log_every", "validate_every", "max_skips", "keep"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "weight_decay", "clip", "warmup", "seed", "max_restarts", "patience", "save_every",
                     "spikes", "z_loss"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise BadInput(f"--{name.replace('_', '-')} {value}: must be finite and not negative")
        if self.schedule is not None:
            self._check_schedule(self.schedule)
        if self.spikes and not self.save_every:
            raise BadInput(f"--spikes {self.spikes} with --save-every 0: there would be no checkpoint to go back to")
        if self.rise > self.steps:
            raise BadInput(f"--steps {self.steps} is shorter than --warmup {self.warmup}: the run would end in its "
                           f"warmup; use a warmup of at most {self.steps} steps, or a longer run")
        if self.seed >= 1 << 63:
            raise BadInput(f"--seed {self.seed}: must be below 2**63")
        if not 0 < self.held_out < 1:
            raise BadInput(f"--held-out {self.held_out}: must be a share between 0 and 1")
        if not 0 <= self.label_smoothing < 1:
            raise BadInput(f"--label-smoothing {self.label_smoothing}: must be a share, at least 0 and less than 1")
        if self.tokens is not None:
            self._check_tokens()
        if self.sequence < 2:
            raise BadInput(f"--sequence {self.sequence}: must be at least 2, for there to be something to predict from")
        if self.width % (2 * self.heads):
            raise BadInput(
                f"--width {self.width} with --heads {self.heads}: each head needs an even number of features; "
                f"use a width that is a multiple of {2 * self.heads}"
            )
        if self.recompute is not None and self.recompute not in ("full", "selective") and not (
                self.recompute.isdecimal() and int(self.recompute) > 0):
            raise BadInput(f"--recompute {self.recompute}: it is full, selective, or every how many blocks")
        if self.profile and self.steps < PROFILED:
            raise BadInput(f"--profile with --steps {self.steps}: it records steps 11 to {PROFILED}; use more steps")
        ours = not self.optimizer.startswith("torch.")
        if self.precision not in ("fp32", "bf16") and not ours:
            raise BadInput(f"--precision {self.precision} with --optimizer {self.optimizer}: it needs loss scales or "
                           f"masters, which torch's has not; use {self.optimizer.removeprefix('torch.')}")
        if self.ema is not None and not ours:
            raise BadInput(f"--ema with --optimizer {self.optimizer}: torch's keeps no average; use "
                           f"{self.optimizer.removeprefix('torch.')}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise BadInput(f"--ema {self.ema}: a decay lies between 0 and 1, like 0.999")
        self._check_processes(self.processes if here is None else here)

    def _check_tokens(self) -> None:
        if self.text is not None:
            raise BadInput(f"--text {self.text} with --tokens {self.tokens}: a run reads text or tokens; leave one out")
        if self.held_out != type(self).held_out:
            raise BadInput(f"--held-out {self.held_out} with --tokens {self.tokens}: what is held out was chosen when "
                           f"the tokens were made; leave it out, or give it to fasttrain tokenize")

    def _check_schedule(self, given: str) -> None:
        from fasttrain.schedules import parse

        if self.warmup is not None:
            raise BadInput(f"--schedule {given!r} with --warmup {self.warmup}: say the warmup in the schedule, as "
                           f"warmup({self.warmup}) + ...")
        try:
            parse(given).check(self.steps)
        except ValueError as error:
            raise BadInput(f"--schedule: {error}") from error

    def _check_processes(self, here: int) -> None:
        if self.batch % self.processes:
            raise BadInput(
                f"--processes {self.processes} with --batch {self.batch}: a step must give every process the same "
                f"number of sequences; use a batch that is a multiple of {self.processes}"
            )
        if self.batch // self.processes % self.accumulate:
            raise BadInput(
                f"--accumulate {self.accumulate} with --batch {self.batch} on {self.processes} processes: every "
                f"backward pass must have the same number of sequences; use a batch that is a multiple of "
                f"{self.processes * self.accumulate}"
            )
        if self.zero and self.wire == "int8":
            raise BadInput("--zero with --wire int8: shards of gradients do not travel in 8 bits; use bf16")
        if self.zero == 3 and self.wire == "ordered":
            raise BadInput("--zero 3 with --wire ordered: the order of a sharded model's sums is its backend's; use "
                           "--zero 2, or --wire same")
        if self.device == "cpu":
            places, kind = usable_processors(), "processor"
            if self.threads > places:
                raise BadInput(f"--threads {self.threads} on {places} processors: use at most {places}")
            most = max(2, places)  # two share a single processor, so that the default runs everywhere
        else:
            import torch

            most = places = torch.cuda.device_count()
            kind = "GPU"
            if places == 0:
                raise BadInput("--device cuda: this torch finds no GPU; use --device cpu")
        if here > most:
            raise BadInput(
                f"--processes {here} on {places} {kind}{'s' if places > 1 else ''}: they would only wait for each "
                f"other; use at most {most}"
            )

    def check_started_by_torchrun(self, world: int, most_restarts: int) -> None:
        """Refuse options that contradict torchrun, which has started this process as one of `world`.

        Raises:
            BadInput: as `check`.
        """
        if self.processes != world:
            raise BadInput(f"--processes {self.processes} under torchrun, which has started {world}: leave it out, or "
                           f"give torchrun the number (--nnodes times --nproc-per-node)")
        if self.max_restarts:
            raise BadInput(f"--max-restarts {self.max_restarts} under torchrun: give it to torchrun, before -m")
        if most_restarts and self.out is None:
            raise BadInput("torchrun with --max-restarts needs --out DIRECTORY here: a process that is started again "
                           "must find what the last one wrote")

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values; `from_json` is the inverse."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The options back from `as_json`."""
        paths = {k: Path(values[k]) for k in ("text", "tokens", "out", "config") if values.get(k) is not None}
        return cls(**{**values, **paths})
