"""The tensors of a checkpoint: each put together from the parts that all ranks hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fasttrain.checkpoint import manifest
from fasttrain.checkpoint.manifest import Part
from fasttrain.checkpoint.pieces import SIZES
from fasttrain.checkpoint.regions import Region


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its dtype (safetensors' name), its whole shape, and where its parts lie."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return Region(self.shape).elements * SIZES[self.dtype]


def gathered(path: Path, ranks: list[manifest.RankManifest]) -> dict[str, Stored]:
    """The parts that all ranks hold of each tensor."""
    found: dict[str, Stored] = {}
    for rank, read in enumerate(ranks):
        for name, dtype, part in read.tensors:
            shape, file = part.region.shape, path / f"{manifest.stem(rank, len(ranks))}.json"
            before = found.get(name, Stored(dtype, shape, ()))
            manifest.need(file, (before.dtype, before.shape) == (dtype, shape),
                          f"{dtype} of shape {shape}, but {before.dtype} of {before.shape} in another part", name)
            found[name] = Stored(dtype, shape, (*before.parts, part))
    return found
