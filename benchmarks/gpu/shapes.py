"""Models as lists of the shapes of their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def equal(tensors: int, elements: int) -> list[Shape]:
    """So many tensors of so many elements."""
    return [(elements,)] * tensors


def gpt2() -> list[Shape]:
    """GPT-2 124M: 148 parameters, the head tied to the embedding; Radford et al. (2019), table 2, first row."""
    block: list[Shape] = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768),
                          (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(block * 12), (768,), (768,)]


def llama3_8b(layers: int = 32) -> list[Shape]:
    """Llama-3-8B (arXiv 2407.21783, table 3), with all of its layers or the first few: 291 parameters in all."""
    block: list[Shape] = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096),
                          (4096, 14336), (4096,), (4096,)]
    return [(128256, 4096), *(block * layers), (4096,), (128256, 4096)]


def resnet50() -> list[Shape]:
    """ResNet-50 (arXiv 1512.03385, table 1): 161 parameters, from filters of 1 x 1 to norms of 64."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for filters in ((width, into, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [filters, (filters[0],), (filters[0],)]
            if block == 0:
                shapes += [(4 * width, into, 1, 1), (4 * width,), (4 * width,)]
            into = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def experts(layers: int = 4, width: int = 1024, hidden: int = 512, count: int = 64) -> list[Shape]:
    """A mixture of 64 experts as separate matrices: 780 parameters of 0.5M to 4M elements, and its routers."""
    block: list[Shape] = [(3 * width, width), (width, width), (count, width), (width,), (width,)]
    block += [shape for _ in range(count) for shape in ((hidden, width), (hidden, width), (width, hidden))]
    return block * layers


def llama_1b(layers: int = 16) -> list[Shape]:
    """The matrices inside the blocks of a model of 1B parameters (those of Llama-3.2-1B)."""
    return [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)] * layers


def gpt2_matrices() -> list[Shape]:
    """Those of GPT-2 124M that Muon orthogonalises: 48."""
    return [shape for shape in gpt2()[2:] if len(shape) == 2]


def count(shapes: Sequence[Shape]) -> int:
    """Elements of all."""
    return sum(map(math.prod, shapes))


def scaled(shapes: Sequence[Shape], most: int) -> list[Shape]:
    """The first of the shapes, as many as have at most so many elements together, and at least one."""
    kept: list[Shape] = []
    total = 0
    for shape in shapes:
        total += math.prod(shape)
        if kept and total > most:
            break
        kept.append(shape)
    return kept
