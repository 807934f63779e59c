"""Steps that a device drives: nothing of them depends on what the host knows, so that a CUDA graph can hold them.

The host says once what is stepped, and which numbers lie where. From then on one call queues a whole step: a prologue
makes the rows of coefficients from step counts, loss scale, norm and hyperparameters in device memory
(`fasttrain.kernels.prologue`), and the kernels read them. Whether the step is skipped is decided on the device, too.

`fasttrain.kernels.reference_driven` does the same naively, reading every number on the host: the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fasttrain.kernels import dispatch
from fasttrain.kernels.item import Item
from fasttrain.kernels.moved import Gradients
from fasttrain.kernels.prologue import Row

# The modules, by backend; each has `driven(items, rows, row_of)` and `why_not(items, rows, row_of)`.
DRIVEN: Mapping[str, str] = {"reference": "reference_driven", "cuda": "cuda_driven", "triton": "triton_driven"}


class Driven(Protocol):
    """A step that is ready to be queued, any number of times. It owns its tables: nothing else writes or drops them.

    Attributes:
        sums: float64 of shape (items, most sums of an item), on the device: what stages with sums leave; a later step
            may read it (a row takes tensors of one element, which may be views of it). At one address for good.
        launches: how many kernels a `launch` queues.
    """

    sums: Tensor
    launches: int

    def launch(self) -> None:
        """Queue one step on the current stream. No work of the host depends on the device, nothing is allocated, and
        nothing is sent.

        In this order, as seen from outside:

        1. every row is made, with its flag `skip`: whether `found` of the row is not zero (NaN is not zero);
        2. the items of rows that are not skipped are stepped. Of items whose row is skipped, only gradients are
           written, zeros where `Item.zero` says so (as a step does that the host skips); sums are left as they are;
        3. the step counts of the items (each `Item.counter` is that item's own tensor), and the counts of draws of the
           rows (each distinct tensor once), are incremented by one, where the row is not skipped.

        Rows read counts as they were before the step, though several items may share a row, whose counter is that of
        one of them. In a capture all of it becomes part of the graph; keep this object as long as the graph.
        """

    def refresh(self, rows: Sequence[Row]) -> None:
        """Take the numbers of other rows, of as many and of the same structure, for the next `launch`. What changed is
        sent, in one copy that the host does not wait for, ordered on the current stream; nothing if nothing changed.

        Never in a capture: its replays would copy those numbers again.

        Raises:
            RuntimeError: a CUDA graph is being captured, and something changed.
            ValueError, TypeError: the rows are others; nothing was sent.
        """

    def update(self, items: Sequence[Item]) -> None:
        """Take the same items with gradients at other addresses, of the same dtypes and sizes, laid out alike. Nothing
        but the addresses is sent, in one copy that the host does not wait for; nothing if nothing changed.

        In a capture the copy becomes part of the graph, from pinned memory that this object made before and from then
        on leaves alone: after that neither `update` nor anything else may write those tables.

        Raises:
            RuntimeError: it was updated in a capture already, and something changed.
            ValueError: an item is another than before; nothing was sent.
        """

    def move(self, grads: Gradients) -> None:
        """As `update`, of the gradients of all items: the caller has compared dtypes, shapes, strides and device."""


def driven(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int], backend: str | None = None) -> Driven:
    """Make a step that a device drives. Not in a capture: tables are sent, and code is compiled and loaded.

    Arguments:
        items: what is stepped, of any rules and storages, on one device; no two write the same memory, and each is
            flat (`fasttrain.kernels.item.flat`). `row` is empty. `key` is the identity of the parameter: the draws of a
            step are keyed by ``parameter_key(step_key(row.seed, draws), key)`` (`fasttrain.precision.draws`), where
            `draws` is the count before the step. `counter`, if there is one, is on the device, of `KINDS`.
        rows: distinct ones. `hyperparameters` are those that the `coefficients` of the items' rule take, by name and
            in that order; numbers are floats, or tensors of one element on the device.
        row_of: the index of the row of each item. The items of a row are of one rule.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    Raises:
        RuntimeError: these items cannot be stepped so; the message says why (`why_not`).

    Example:
        >>> import torch
        >>> from fasttrain.optim import SGD
        >>> p, lr, found = torch.ones(2), torch.tensor(0.5), torch.tensor(False)
        >>> item = Item("p", SGD.rules[0], (p, torch.ones(2)), (), None)
        >>> row = Row(dict(lr=lr, momentum=0.0, dampening=0.0, weight_decay=0.0), found=found)
        >>> step = driven([item], [row], [0], "reference")
        >>> step.launch(); p
        tensor([0.5000, 0.5000])
        >>> _ = lr.fill_(0.25); step.launch(); p
        tensor([0.2500, 0.2500])
        >>> _ = found.fill_(True); step.launch(); p
        tensor([0.2500, 0.2500])
    """
    module = dispatch.part(DRIVEN[_backend(items, backend)])
    if reason := module.why_not(items, rows, row_of):
        raise RuntimeError(reason)
    made: Driven = module.driven(items, rows, row_of)
    return made


def why_not(items: Sequence[Item], rows: Sequence[Row], row_of: Sequence[int],
            backend: str | None = None) -> str | None:
    """Why `driven` cannot step these items, naming the first that it cannot, or None if it can. Nothing is sent."""
    reason: str | None = dispatch.part(DRIVEN[_backend(items, backend)]).why_not(items, rows, row_of)
    return reason


def _backend(items: Sequence[Item], backend: str | None) -> str:
    device = items[0].tensors[0].device if items else torch.device("cpu")
    chosen = dispatch.choose(device, backend)
    if chosen in DRIVEN:
        return chosen
    return "triton" if "triton" in DRIVEN and dispatch.load("triton").why_not(device) is None else "reference"
