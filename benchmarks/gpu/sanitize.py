"""Small steps, norms and packs, for compute-sanitizer: ``compute-sanitizer python -m benchmarks.gpu.sanitize``.

Sizes that end in the middle of a vector, of a block and of a tile; starts that are aligned and not. The numbers are
compared with the reference's, which says that what was watched did its work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fasttrain.optim
from fasttrain.kernels import dispatch, norm
from fasttrain.kernels.pack import Slots

SIZES = (1, 255, 257, 1024, 4099, 20_001)
STORAGES: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("AdamW", torch.float32, {}),
    ("AdamW", torch.float32, {"zero_gradients": True, "ema_decay": 0.9}),
    ("AdamW", torch.bfloat16, {"master": "split"}),
    ("AdamW", torch.bfloat16, {"storage": "8-byte", "clip_value": 0.5}),
    ("Lion", torch.bfloat16, {"master": "stochastic", "state_dtype": "int8"}),
    ("SGD", torch.float16, {"momentum": 0.9, "master": "fp32"}),
    ("LAMB", torch.float32, {}),  # a rule with sums between its stages
)


def vectors(device: torch.device, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The same numbers on every device: of every size, every other one off its alignment."""
    numbers = torch.Generator().manual_seed(seed)
    made = []
    for index, size in enumerate(SIZES):
        past = index % 2
        made.append(torch.randn(size + past, generator=numbers).to(dtype).to(device)[past:])
    return made


def stepped(name: str, dtype: torch.dtype, options: dict[str, Any], device: torch.device,
            backend: str) -> list[Tensor]:
    """Parameters after two steps with clipping."""
    params = [Parameter(vector) for vector in vectors(device, dtype, 1)]
    optimizer = getattr(fasttrain.optim, name)(params, lr=1e-2, backend=backend, **options)
    for step in range(2):
        for p, grad in zip(params, vectors(device, dtype, 2 + step), strict=True):
            p.grad = grad
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return [p.detach().cpu() for p in params]


def squares(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Sums of squares, and the flag."""
    sums, bad = norm.squares(vectors(device, dtype, 5))
    return [sums.cpu(), norm.total(sums).cpu(), bad.cpu()]


def packed(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """A bucket, and what comes out of it."""
    given = vectors(device, torch.float32, 6)
    starts, room = [], 3
    for tensor in given:
        starts.append(room)
        room += tensor.numel() + 5
    slots = Slots(torch.zeros(room, dtype=dtype, device=device), given, starts)
    slots.pack_all(given, 0.5)
    back = [torch.zeros_like(tensor) for tensor in given]
    slots.unpack_all(back, 2.0)
    return [slots.bucket.cpu(), *(tensor.cpu() for tensor in back)]


def cases(device: torch.device) -> dict[str, tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]]:
    """What is run there, and here for comparison."""
    home = torch.device("cpu")
    found = {}
    wanted = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    backends = [name for name in wanted if dispatch.load(name).why_not(device) is None]
    for name, dtype, options in STORAGES:
        for backend in backends:
            found[f"{name} {dtype} {options} in {backend}"] = (
                lambda a=name, b=dtype, c=options, d=backend: stepped(a, b, c, device, d),
                lambda a=name, b=dtype, c=options: stepped(a, b, c, home, "reference"))
    for dtype in (torch.float32, torch.bfloat16):
        found[f"norm {dtype}"] = (lambda a=dtype: squares(device, a), lambda a=dtype: squares(home, a))
        found[f"pack {dtype}"] = (lambda a=dtype: packed(device, a), lambda a=dtype: packed(home, a))
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.sanitize")
    parser.add_argument("--device", default="cuda:0")
    device = torch.device(parser.parse_args(arguments).device)
    wrong = []
    for name, (there, here) in cases(device).items():
        for got, wanted in zip(there(), here(), strict=True):
            if not torch.equal(got.view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)):
                wrong.append(name)
                break
    print(f"{len(cases(device))} cases, {len(wrong)} with other bits than the reference's"
          + "".join(f"\n  {name}" for name in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
