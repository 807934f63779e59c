"""Dropout where ranks hold copies of an activation, or their own positions of it: all drop what one process would.

With torch's own dropout both need generators that are alike on the ranks of the tensor axis, so that is looked at when
the first module drops. `fasttrain.parallel.dropout`, which draws by seed and place, needs only to know which positions
are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.dropout import _DropoutNd

from fasttrain.parallel import dropout as by_place
from fasttrain.parallel.tensor.moves import SEQUENCE
from fasttrain.parallel.tensor.styles import Site, Style


class Dropped(Style):
    """A Dropout of divided positions: each rank draws for all positions, and takes what is drawn for its own."""

    def problem(self, module: nn.Module, size: int) -> str | None:
        return None if isinstance(module, nn.Dropout) else f"a {type(module).__name__} is no Dropout"

    def attach(self, module: nn.Module, mesh: Any, name: str) -> nn.Module:
        """One that draws by place is told its positions, unless `seed_dropout` was."""
        if not isinstance(module, by_place.Dropout):
            return super().attach(module, mesh, name)
        if not any(cut.dim in (SEQUENCE, SEQUENCE - 3) for cut in module.cuts):
            module.cuts = (*module.cuts, by_place.Cut(SEQUENCE, mesh.get_local_rank(), mesh.size()))
        return module

    def compute(self, at: Site, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, = (*args, *kwargs.values())
        if not at.module.training or at.module.p == 0:
            return forward(x)
        shape = list(x.shape)
        shape[SEQUENCE] *= at.mesh.size()
        drawn = F.dropout(x.new_ones(shape), at.module.p)
        return x * drawn.chunk(at.mesh.size(), SEQUENCE)[at.mesh.get_local_rank()]


class Alike:
    """A hook that compares the generators of the ranks once, before the first module that drops something."""

    def __init__(self, mesh: Any):
        self.mesh, self.done = mesh, False

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        if self.done or not module.training or module.p == 0:
            return
        self.done = True
        device = torch.device(self.mesh.device_type)
        state, seed = torch.get_rng_state(), torch.initial_seed()
        if device.type == "cuda":
            state, seed = torch.cuda.get_rng_state(), torch.cuda.initial_seed()
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=7).digest()
        own = torch.tensor([[seed & (1 << 62) - 1, int.from_bytes(digest, "little")]], device=device)
        every = DTensor.from_local(own, self.mesh, [Shard(0)], run_check=False).full_tensor().tolist()
        if any(found != every[0] for found in every):
            raise RuntimeError("the ranks of the tensor axis would drop different elements of what they hold alike: "
                               f"their generators, seeded with {', '.join(str(seed) for seed, _ in every)}, are not in "
                               "one state. Call torch.manual_seed on each with one seed, as seed + mesh.replica, "
                               "before the first step, and draw nothing on some of them only")


def watch(model: nn.Module, mesh: Any) -> None:
    """Compare the generators before anything is dropped."""
    alike = Alike(mesh)
    for module in model.modules():
        if isinstance(module, _DropoutNd) and not isinstance(module, by_place.Dropout):
            module.register_forward_pre_hook(alike)
