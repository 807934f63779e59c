"""What GPUs and links can do, from data sheets, and what of it a plan assumes to be reached."""

from __future__ import annotations

import dataclasses

from fasttrain.train.config import BadInput
from fasttrain.train.usage import PEAKS


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU among others.

    Attributes:
        memory: bytes; the GB of data sheets are taken for 1e9, which leaves some hundredths for the driver.
        flops: of 16-bit products, in a second.
        bandwidth: of its memory, bytes in a second.
        inside, across: bytes in a second that it sends to others of its node, and to other nodes.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    inside: float
    across: float


NIC = 50e9  # one adapter of 400 Gb/s for each GPU
DEVICES = {device.name: device for device in (
    Device("a100-80", 80e9, PEAKS["A100"], 2.039e12, 300e9, 25e9),  # NVLink 600 GB/s of both directions; 200 Gb/s
    Device("h100-80", 80e9, PEAKS["H100"], 3.35e12, 450e9, NIC),
    Device("h200", 141e9, PEAKS["H200"], 4.8e12, 450e9, NIC),
    Device("b200", 180e9, PEAKS["B200"], 7.7e12, 900e9, NIC),
)}


def device(text: str) -> Device:
    """A GPU by its name, or one of so many bytes ("40e9", "24GiB") that is otherwise an H100.

    Raises:
        BadInput: it is neither.

    Example:
        >>> device("24GiB").memory
        25769803776.0
    """
    if text in DEVICES:
        return DEVICES[text]
    number, unit = text, 1.0
    for suffix, size in (("GiB", 2.0**30), ("GB", 1e9)):
        if text.endswith(suffix):
            number, unit = text.removesuffix(suffix), size
    try:
        memory = float(number) * unit
    except ValueError:
        memory = 0.0
    if not 0 < memory < float("inf"):
        raise BadInput(f"--gpu {text}: give {', '.join(DEVICES)}, or bytes, as 40e9 or 24GiB")
    return dataclasses.replace(DEVICES["h100-80"], name=text, memory=memory)


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What a time is made of that nobody has measured; all of it is printed with the times.

    Attributes:
        per_node: GPUs of a node, whose ranks are neighbours.
        products: share of `flops` that products and attention reach.
        links: share of a link's bytes in a second that collectives reach.
        memory: share of the memory's bandwidth that a step of the optimizer reaches.
        inside, across: bytes in a second, in place of the device's.
    """

    per_node: int = 8
    products: float = 0.5
    links: float = 0.8
    memory: float = 0.8
    inside: float | None = None
    across: float | None = None

    def __post_init__(self) -> None:
        if self.per_node < 1:
            raise BadInput(f"--gpus-per-node {self.per_node}: must be at least 1")
        for name, value in (("efficiency", self.products), ("link-efficiency", self.links),
                            ("memory-efficiency", self.memory)):
            if not 0 < value <= 1:
                raise BadInput(f"--{name} {value}: a share is above 0 and at most 1")
        for name, speed in (("intra-gb-s", self.inside), ("inter-gb-s", self.across)):
            if speed is not None and not 0 < speed < float("inf"):
                raise BadInput(f"--{name} {speed / 1e9}: must be above 0")

    def seconds(self, device: Device, sent: float, across: bool) -> float:
        """Of so many bytes on the links of a node, or where some of the ranks are on other nodes."""
        speed = (self.across or device.across) if across else (self.inside or device.inside)
        return sent / (speed * self.links)

    def told(self, device: Device) -> list[str]:
        """In words."""
        return [
            f"{device.name}: {device.memory / 1e9:.0f} GB, {device.flops / 1e12:.0f} TFLOP/s in 16 bits, of which "
            f"products and attention reach {self.products:.0%}; memory at {device.bandwidth / 1e12:.2f} TB/s, of which "
            f"a step of the optimizer reaches {self.memory:.0%}",
            f"nodes of {self.per_node}; each GPU sends {(self.inside or device.inside) / 1e9:.0f} GB/s inside its node "
            f"and {(self.across or device.across) / 1e9:.0f} GB/s across, of which collectives reach {self.links:.0%}; "
            "no latency; a ring is as slow as its slowest link",
            "tensor, context and expert traffic waits for nothing and hides under nothing; gradients hide under the "
            "backward pass of one micro-batch, and what ZeRO 3 gathers under all that is computed; parameters that "
            "ZeRO 1 and 2 gather hide under nothing; between stages only filling and draining the pipeline waits",
        ]
