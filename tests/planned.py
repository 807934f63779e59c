"""What a model really keeps and sends, to stand beside what a plan says."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.optim import AdamW
from fasttrain.plan import shapes, tensors
from fasttrain.plan.job import Job
from fasttrain.precision.mixed import Precision
from fasttrain.train.blocks import recompute
from fasttrain.train.model import GPT
from fasttrain.train.objective import loss_of

LAYERS, WIDTH, HEADS, ROWS, VOCABULARY, BATCH, POSITIONS = 3, 64, 4, 50, 96, 4, 16


def sizes(kv_heads: int = 4, gated: bool = False, tied: bool = False, ngrams: int = 1) -> dict[str, Any]:
    return dict(kv_heads=kv_heads, gated=gated, tied=tied, ngrams=ngrams)


def job_of(model: dict[str, Any], precision: str = "fp32", storage: str = "plain", **options: Any) -> Job:
    """The job of a model of these sizes, one micro-batch a step."""
    shape = shapes.ours(LAYERS, WIDTH, HEADS, rows=ROWS, vocabulary=VOCABULARY, **model)
    return Job(shape, POSITIONS, **{"batch": BATCH, "micro_batch": BATCH, "precision": precision, "storage": storage,
                                    "kernels": "cpu", **options})


def model_of(model: dict[str, Any], precision: str = "fp32", how: str = "none") -> tuple[GPT, Precision]:
    torch.manual_seed(0)
    ngrams = model["ngrams"]
    made = GPT(LAYERS, WIDTH, HEADS, POSITIONS, ngrams, ROWS, VOCABULARY,
               **{key: value for key, value in model.items() if key != "ngrams"})
    chosen = Precision(precision, keep=("cos", "sin") if precision.endswith("pure") else ())
    chosen.cast(made)
    if how != "none":
        recompute(made, how, blocks="blocks")
    return made, chosen


def whole(job: Job, tensor: int = 1) -> tensors.Stage:
    """All parts on one rank of a pipeline of one."""
    return tensors.stage(job.shape, tensor=tensor)


def loss(model: GPT, precision: Precision) -> torch.Tensor:
    windows = torch.arange(BATCH * (POSITIONS + 1)).view(BATCH, -1) * 7 % VOCABULARY
    with precision.autocast():
        return loss_of(model, windows)


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def kept(model: GPT, precision: Precision) -> tuple[int, torch.Tensor]:
    """Bytes of the memories that autograd keeps for backward, but for parameters and tables of angles; and the loss."""
    own = {local(p.detach()).untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = local(tensor.detach()).untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss(model, precision)
    return sum(found.values()), result


class Sent(TorchDispatchMode):
    """Bytes that torch's functional collectives over `size` ranks make each send, by the formula of a ring.

    DTensor's collectives are these: they do not go through a `Wire`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first makes local operators and collectives of it
        name = op.__name__.split(".")[0]
        ways = {"all_reduce": 2 * (self.size - 1) / self.size, "all_gather_into_tensor": self.size - 1,
                "reduce_scatter_tensor": (self.size - 1) / self.size}
        if "c10d_functional" in str(op.namespace) and name in ways:
            self.bytes[name] += args[0].nbytes * ways[name]
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def stepped(model: Any, **options: Any):
    """An optimizer whose states are there."""
    optimizer = AdamW(model.parameters(), lr=1e-3, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    yield optimizer


def elements(model: Any) -> int:
    return sum(math.prod(local(p.detach()).shape) for p in model.parameters())
