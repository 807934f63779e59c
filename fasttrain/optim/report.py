"""What one step did, in numbers that do not depend on the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from fasttrain.kernels.item import Item
from fasttrain.kernels.ring import sent
from fasttrain.precision.codecs import codec


@dataclass
class StepReport:
    """Counts of one step; `optimizer.last_step`.

    Attributes:
        parameters: parameters that were stepped.
        launches: kernels launched, or walks of the CPU: one for each (rule, storage combination, device) on a GPU, one
            for everything that one walk can take on the CPU. A norm is one more. Rules with sums: docs/optimizers.md.
        bytes_read, bytes_written: of parameters, gradients, states and what else is kept with them.
        allocations: tensors that the step made: states at a parameter's first step, copies of strided tensors.
        host_syncs: how often the host waited for a device.
        copies, bytes_sent: copies to GPUs, and their bytes: rows of coefficients and what changed in the tables of
            addresses (docs/optimizers.md). None where neither coefficients nor addresses changed.
        skipped: whether a gradient scaler had found something not finite. False where only the device knows.
        driven: whether the device drove the step (docs/graphs.md): it decided whether to skip it.
    """

    parameters: int = 0
    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    allocations: int = 0
    host_syncs: int = 0
    copies: int = 0
    bytes_sent: int = 0
    skipped: bool = False
    driven: bool = False
    _before: tuple[int, int, int] = field(default_factory=sent.now, repr=False, compare=False)

    def close(self) -> None:
        """Count what was sent to devices since the report was begun."""
        copies, size, waits = (now - before for now, before in zip(sent.now(), self._before, strict=True))
        self.copies, self.bytes_sent = copies, size
        self.host_syncs += waits

    def count(self, item: Item) -> None:
        """Add the traffic of an item."""
        self.parameters += 1
        extras = item.extras or (None,) * len(item.tensors)
        for operand, (main, extra) in enumerate(zip(item.tensors, extras, strict=True)):
            size = main.nbytes + (0 if extra is None else extra.nbytes)
            copied = item.codecs and operand == 0 and codec(item.codecs[0]).name.startswith("master")
            self.bytes_read += extra.nbytes if copied and extra is not None else size  # the rounded copy is not read
            self.bytes_written += size if operand != 1 or item.zero else 0
