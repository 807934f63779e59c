"""The subcommand ``fasttrain plan``: its options, and what it does. torch is loaded when it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fasttrain.plan import shapes
from fasttrain.plan.job import AXES, Job
from fasttrain.plan.shapes import Shape
from fasttrain.train.config import BadInput

MODEL = dict(layers=4, width=128, heads=4, ngrams=4, rows=8192, vocabulary=256)  # of the main job, without options
SEQUENCES = {"ours": 128, "gpt2": 1024, "llama": 8192}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what a training would take on so many GPUs, for each way of dividing it: memory, links, bubbles, time."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """gpt (the main job's; sizes by options), gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-3-8b, llama-3-70b,
    llama-3-405b, mixtral-8x7b, or the path of a config.json of Hugging Face."""
    gpus: int
    """How many GPUs there are."""
    gpu: str = "h100-80"
    """a100-80, h100-80, h200, b200, or bytes of memory: 40e9, 24GiB."""
    gpus_per_node: int = 8
    """Of a node, whose GPUs share faster links."""

    sequence: int | None = None
    """Tokens of a sequence. Without it: 128 of gpt, 1024 of gpt2, 8192 of others."""
    batch: int | None = None
    """Sequences of a step, over all GPUs together. Without it: 32 for each GPU."""
    micro_batch: int = 1
    """Sequences that a rank takes at a time."""
    precision: Literal["fp32", "bf16", "bf16-pure"] = "bf16-pure"
    """As of train."""
    storage: str | None = None
    """How the optimizer keeps its states: plain, mixed, split, 10-byte, 8-byte, 7-byte, 6-byte, 5-byte. Without it:
    split where parameters have 16 bits, else plain."""
    optimizer: str = "AdamW"
    """One of fasttrain.optim that steps element by element."""
    grad_dtype: Literal["same", "fp32"] = "same"
    """In which gradients are kept and averaged."""
    kernels: Literal["cuda", "cpu"] = "cuda"
    """Whose operators keep what they need for backward."""
    attention: Literal["flash", "full"] = "flash"
    """full: the products of all pairs of positions are kept, of published models."""

    layers: int | None = None
    """Of gpt: as of train, like the next."""
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    gated: bool = False
    tied: bool = False
    ngrams: int | None = None
    rows: int | None = None
    vocabulary: int | None = None
    experts: int | None = None
    top_k: int | None = None

    data: int | None = None
    """Ranks along this axis. Without it, and so for the next: all that divide the GPUs are tried."""
    shard: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    expert: int | None = None
    context: int | None = None
    zero: Literal[0, 1, 2, 3] | None = None
    """Stage of ZeRO. Without it: all."""
    sequence_parallel: Literal["on", "off"] | None = None
    """Divide positions over the tensor axis between blocks. Without it: both."""
    recompute: Literal["none", "selective", "full"] | None = None
    """As of train. Without it: all."""
    schedule: str | None = None
    """Of the pipeline: gpipe, 1f1b, interleaved, zero-bubble, zbv. Without it: all."""
    stages_per_rank: int | None = None
    """Of interleaved and zero-bubble schedules. Without it: some."""

    efficiency: float = 0.5
    """Share of the GPU's peak that products and attention reach."""
    link_efficiency: float = 0.8
    """Share of a link's speed that collectives reach."""
    intra_gb_s: float | None = None
    """GB/s that a GPU sends inside its node. Without it: the data sheet's."""
    inter_gb_s: float | None = None
    """GB/s that a GPU sends to other nodes. Without it: one adapter of 400 Gb/s each (A100: 200)."""

    show: int = 10
    """The best so many ways; 0: all."""
    json: bool = False
    """Print JSON, with all digits."""

    def run(self) -> int:
        """Print the plan."""
        if self.gpus < 1:
            raise BadInput(f"--gpus {self.gpus}: must be at least 1")
        if self.show < 0:
            raise BadInput(f"--show {self.show}: must not be negative")
        job = self.job()
        from fasttrain.plan import hardware, table
        from fasttrain.plan.planning import plan
        from fasttrain.plan.ways import Asked

        device = hardware.device(self.gpu)
        assumed = hardware.Assumed(
            self.gpus_per_node, self.efficiency, self.link_efficiency,
            inside=None if self.intra_gb_s is None else self.intra_gb_s * 1e9,
            across=None if self.inter_gb_s is None else self.inter_gb_s * 1e9)
        axes = {axis: size for axis in AXES if (size := getattr(self, axis)) is not None}
        asked = Asked(axes, self.zero, None if self.sequence_parallel is None else self.sequence_parallel == "on",
                      self.recompute, self.schedule, self.stages_per_rank, self.gpus_per_node)
        found, why = plan(job, self.gpus, device, assumed, asked)
        say = table.as_json if self.json else table.text
        print(say(job, self.gpus, device, assumed, found, why, self.show))
        return 0

    def job(self) -> Job:
        """What is to be trained.

        Raises:
            BadInput: options that contradict one another.
        """
        shape = self.shape()
        sequence = SEQUENCES[shape.family] if self.sequence is None else self.sequence
        if shape.positions and sequence > shape.positions:
            raise BadInput(f"--sequence {sequence}: {shape.name} has positions for {shape.positions}")
        storage = self.storage or ("split" if self.precision == "bf16-pure" else "plain")
        return Job(shape, sequence, 32 * self.gpus if self.batch is None else self.batch, self.micro_batch,
                   self.precision, storage, self.optimizer, 4 if self.grad_dtype == "fp32" else None, self.kernels,
                   self.attention == "flash")

    def shape(self) -> Shape:
        """Of which model."""
        names = (*MODEL, "kv_heads", "gated", "tied", "experts", "top_k")
        given = {name: value for name in names if (value := getattr(self, name)) not in (None, False)}
        if self.model == "gpt" and not Path(self.model).exists():
            return shapes.ours(**{**MODEL, **given})
        if given:
            raise BadInput(f"--{next(iter(given)).replace('_', '-')} with {self.model}, whose sizes are known: leave "
                           "it out, or plan gpt")
        return shapes.named(self.model)
