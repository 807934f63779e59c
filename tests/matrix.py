"""Parallel training beside one process: the cases, the model, and what one process makes of the same batches.

A case is a stage of ZeRO, a wire, micro-batches, unused and tied parameters, dtypes, ranks and buckets. `matrix.txt` is
the committed list in which every pair of values occurs; `products` has all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.proof.covering import cover

LIST = Path(__file__).with_name("matrix.txt")
F32, BF16 = torch.float32, torch.bfloat16
WIDTH, WORDS, STEPS = 24, 11, 3


class Case(NamedTuple):
    """One way to train."""

    stage: str
    wire: str
    accumulate: str
    unused: str
    tied: str
    dtypes: str
    ranks: str
    buckets: str

    def __str__(self) -> str:
        return ", ".join(self)

    @property
    def size(self) -> int:
        return int(self.ranks.split()[0])

    @property
    def exact(self) -> bool:
        """Whether bits are promised: not where gloo adds in an order of its own, which two addends do not have."""
        return self.wire != "int8" and (self.stage != "stage 0" or self.wire != "same" or self.size <= 2)

    def groups(self) -> list[int]:
        """Micro-batches of each step."""
        most = int(self.accumulate.split()[1])
        return [most] * (STEPS - 1) + [most - 1 if "uneven" in self.accumulate else most]


FACTORS = {
    "stage": ["stage 0", "stage 1", "stage 2", "stage 3"],
    "wire": ["same", "ordered", "bf16", "int8"],
    "accumulate": ["accumulate 1", "accumulate 2", "accumulate 3", "accumulate 3 uneven"],
    "unused": ["all used", "unused on one rank", "unused on all"],
    "tied": ["tied", "untied"],
    "dtypes": ["float32", "mixed", "mixed in float32 buckets"],
    "ranks": ["1 rank", "2 ranks", "4 ranks"],
    "buckets": ["small buckets", "one bucket"],
}
SIZES = (1, 2, 4)


def allowed(case: Any) -> bool:
    """Whether a case, or some factors of it, can be: all else is refused, and tested there."""
    if case.get("stage") in ("stage 1", "stage 2"):
        return case.get("wire") != "int8"
    if case.get("stage") == "stage 3":
        if case.get("wire") == "bf16" and case.get("dtypes") == "mixed in float32 buckets":
            return False  # it has one dtype for both
        return case.get("wire") not in ("int8", "ordered") and case.get("unused") != "unused on one rank"
    return True


def covering() -> list[Case]:
    """A short list with every pair of values that can be, and the one way whose sums have no promised bits."""
    inexact = Case("stage 0", "same", "accumulate 2", "unused on one rank", "tied", "mixed", "4 ranks", "small buckets")
    return [*(Case(**case) for case in cover(FACTORS, None, allowed)), inexact]


def listed() -> list[Case]:
    """The committed list."""
    return [Case(*line.split(", ")) for line in LIST.read_text().splitlines()]


def products() -> list[list[Case]]:
    """All cases, those together that one start of the ranks runs."""
    found: dict[Any, list[Case]] = {}
    for case in itertools.starmap(Case, itertools.product(*FACTORS.values())):
        if allowed(case._asdict()):
            found.setdefault((case.stage, case.wire, case.dtypes, case.ranks), []).append(case)
    return list(found.values())


# --- The model and its batches ----------------------------------------------------------------------------------------

class Net(nn.Module):
    """Blocks of one dtype and the rest of another; `extra` is what may be unused."""

    def __init__(self, case: Case):
        super().__init__()
        torch.manual_seed(7)
        small = F32 if case.dtypes == "float32" else BF16
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH).to(small) for _ in range(3))
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if case.tied == "tied":
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, extra: bool) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer(h.to(layer.weight.dtype)).relu().float()
        if extra:
            h = h + self.extra(h)
        return self.head(self.norm(h))


def batch_of(step: int, rank: int, micro: int) -> Tensor:
    """Token numbers, of a different number of rows for each rank and micro-batch."""
    numbers = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
    return torch.randint(0, WORDS, (1 + (step + rank + micro) % 3, 5), generator=numbers)


def loss_of(model: Any, case: Case, x: Tensor, rank: int) -> Tensor:
    """Added up, not averaged."""
    extra = case.unused == "all used" or (case.unused == "unused on one rank" and rank == 0)
    return nn.functional.cross_entropy(model(x, extra).flatten(0, 1), x.flatten(), reduction="sum")


# --- What one process makes of it -------------------------------------------------------------------------------------

def gradients(model: nn.Module, case: Case, x: Tensor, rank: int) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss_of(model, case, x, rank), list(model.parameters()), allow_unused=True))


def of_ranks(model: nn.Module, case: Case, step: int) -> list[list[Tensor | None]]:
    """The gradients of each rank, its micro-batches added up one after the other where the case accumulates them."""
    found = []
    for rank in range(case.size):
        total: list[Tensor | None] = [None] * len(list(model.parameters()))
        for micro in range(case.groups()[step]):
            for index, grad in enumerate(gradients(model, case, batch_of(step, rank, micro), rank)):
                before = total[index]
                if grad is not None:
                    total[index] = grad.to(held_in(case, grad)) if before is None else (before + grad).to(before.dtype)
        found.append(total)
    return found


def held_in(case: Case, grad: Tensor) -> torch.dtype:
    """The dtype in which gradients are accumulated."""
    if case.dtypes == "mixed in float32 buckets":
        return F32
    return BF16 if case.stage == "stage 3" and case.wire == "bf16" else grad.dtype


def mean_of(case: Case, grads: Sequence[Tensor | None], p: Tensor) -> Tensor | None:
    """The mean over ranks in the bits that are promised: added in their order, in float32; None if none has any.

    With wire "bf16" each addend is rounded to it, and at stage 0 the mean once more. At stage 3 the mean is rounded to
    the parameter's dtype.
    """
    own = next((grad for grad in grads if grad is not None), None)
    if own is None:
        return None
    narrow = case.wire == "bf16"
    total = torch.zeros_like(own, dtype=F32)
    for grad in grads:
        if grad is not None:
            total = total + (grad.to(BF16) if narrow else grad).float()
    mean = total * (1.0 / case.size)
    if narrow and case.stage == "stage 0":
        mean = mean.to(BF16)
    return mean.to(own.dtype).to(p.dtype if case.stage == "stage 3" else own.dtype)


def full_batch(model: nn.Module, case: Case, step: int) -> tuple[list[Tensor | None], int]:
    """The gradients of one batch of everything, divided by its rows, and these.

    Where one rank uses more than the others its rows are a batch of their own.
    """
    rows = [(rank, batch_of(step, rank, micro)) for rank in range(case.size) for micro in range(case.groups()[step])]
    apart = [[x for rank, x in rows if rank == 0], [x for rank, x in rows if rank]]
    together = apart if case.unused == "unused on one rank" else [[x for _, x in rows]]
    total: list[Tensor | None] = [None] * len(list(model.parameters()))
    for index, some in enumerate(together):
        if some:
            for at, grad in enumerate(gradients(model, case, torch.cat(some), index)):
                if grad is not None:
                    total[at] = grad.float() if total[at] is None else total[at] + grad.float()  # type: ignore[operator]
    count = sum(len(x) for _, x in rows)
    return [None if grad is None else grad / count for grad in total], count
