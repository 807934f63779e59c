"""The options of ``fasttrain train``: one dataclass; `fasttrain.train.checking` says which cannot work."""

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

    kv_heads: int | None = None
    """Heads of keys and values, each for several heads of queries. Without it: as many as heads."""
    gated: bool = False
    """Multiply by a gate in the feed-forward parts, in place of squaring."""
    tied: bool = False
    """Predict with the embedding of single bytes (or tokens)."""
    experts: int = 0
    """Experts in the feed-forward part of every block, of which each position uses --top-k; 0: one for all."""
    top_k: int = 2
    """Experts for each position."""

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
    """Processes. Those that no option below lets divide the model divide the batch. Under torchrun: as many as it has
    started."""
    tensor: int = 1
    """Processes that divide every matrix."""
    sequence_parallel: bool = False
    """Let those divide what lies between the matrices, too, by positions."""
    pipeline: int = 1
    """Processes that divide the blocks, one stage or more for each; --accumulate is the number of micro-batches."""
    stages: int = 1
    """Stages for each of them."""
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv"] = "1f1b"
    """In which order a pipeline works (docs/pipeline.md)."""
    expert: int = 1
    """Processes that divide the experts, and the batch."""
    context: int = 1
    """Processes that divide each sequence."""
    copies: int | None = None
    """Of the sharded model of --zero 3. Without it: one."""
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

    @property
    def axes(self) -> dict[str, int]:
        """Sizes for `fasttrain.parallel.Mesh`: what options do not divide divides the batch."""
        rest = self.processes // max(1, self.tensor * self.pipeline * self.expert * self.context)
        data = (1 if self.zero == 3 else rest) if self.copies is None else self.copies
        return {"pipeline": self.pipeline, "data": data, "shard": rest // max(1, data) if self.zero == 3 else 1,
                "expert": self.expert, "context": self.context, "tensor": self.tensor}

    @property
    def replicas(self) -> int:
        """How many processes read different sequences."""
        return self.processes // max(1, self.tensor * self.pipeline * self.context)

    @property
    def model_parallel(self) -> bool:
        """Whether processes divide more than the batch and what belongs to it."""
        return self.tensor * self.pipeline * self.expert * self.context > 1

    def check_started_by_torchrun(self, world: int, most_restarts: int) -> None:
        """Refuse options that contradict torchrun, which has started this process as one of `world`.

        Raises:
            BadInput: as `fasttrain.train.checking.check`.
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
