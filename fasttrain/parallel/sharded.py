"""ZeRO stage 3: torch's `fully_shard` in one call, for the optimizers of this package on its shards.

Parameters, gradients and states are divided over the ranks; `fully_shard` gathers the parameters of a block when its
forward or backward pass comes, and reduces its gradients into shards. What is ours is around that: the ranks compared
and made equal, gloo's collectives replaced, accumulation, tokens, and clear answers to what cannot work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fasttrain.dist import accounting
from fasttrain.dist.mesh import Mesh
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire
from fasttrain.optim import clip
from fasttrain.optim.arrival import Arrival
from fasttrain.parallel import replaced, shardable, ties
from fasttrain.parallel.accumulate import Accumulation
from fasttrain.parallel.grids import Grid, Named, Torch
from fasttrain.parallel.scattered import Gathered, Scattered
from fasttrain.parallel.unfinished import Watched
from fasttrain.parallel.units import Later
from fasttrain.precision.loss_scale import LossScaler, step_divided


def shard(model: nn.Module, mesh: Mesh | DeviceMesh | None = None, *, blocks: str | Sequence[nn.Module] | None = None,
          reduce_dtype: torch.dtype | None = None, param_dtype: torch.dtype | None = None,
          reshard_after_forward: bool | int | None = True, wire: str = "same", init_sync: bool = True,
          timeout_s: float = 120, watch: Watcher | bool = True, tied: Mapping[str, Sequence[int]] | None = None,
          **options: Any) -> Sharded:
    """Divide a model over the ranks by torch's `fully_shard`: each block, then the rest.

    The model itself is changed, and used as before; make the optimizer afterwards, of its parameters, which are shards
    (DTensor) now. After backward `p.grad` is this rank's part of the mean over ranks. Clipping, storages and averages
    (`ema_decay`) of `fasttrain.optim` are those of the whole model, and `fasttrain.optim.consolidate` makes a plain
    state dict.

    Arguments:
        model: the same on every rank.
        mesh: a `Mesh`: parameters are cut along its axis "shard", in addition to what tensor parallelism, experts and
            stages have cut before. Or a DeviceMesh of one dimension; of two, the first holds copies and the second
            shards (torch's HSDP). None: all ranks.
        blocks: the modules that are gathered one after the other, or the name of a ModuleList or Sequential of them;
            None: the ModuleList with most parameters, if there is any.
        reduce_dtype: in which gradients travel and are accumulated; None: that of the parameters. On gloo they are
            added in float32 at least whatever travels.
        param_dtype: in which parameters are gathered and computed with; None: their own.
        reshard_after_forward: let go of a block's parameters between its forward and backward pass.
        wire: "same", or "bf16", which is `reduce_dtype=torch.bfloat16`.
        init_sync: give every rank the first rank's parameters and buffers; False if they are equal for sure.
        timeout_s, watch: see `fasttrain.parallel.Reducer`; of a `Mesh`: what that has.
        tied: as to `fasttrain.parallel.Reducer`: of parameters that several stages of a pipeline have, by their names
            here, the stages; all stages give all ties, in one order.
        options: for torch's `fully_shard`: `offload_policy`, `ignored_params`, `shard_placement_fn`.

    Returns:
        What accumulates, counts and steps; the model is its `module`.

    Raises:
        TypeError, ValueError: a model that is wrapped or sharded already, blocks that are not in it, a mesh of another
            kind or with shard=1, or a wire that `fully_shard` cannot have. Nothing is changed.
        DisagreementError: the ranks have different parameters or options; the same text on every rank.

    Source: S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, arXiv:1910.02054, section 5.3.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> sharded = shard(model, blocks=[model[0]])                                   # doctest: +SKIP
        >>> optimizer = AdamW(model.parameters(), lr=1e-3)                              # doctest: +SKIP
        >>> accumulate = sharded.accumulate(4)                                          # doctest: +SKIP
    """
    shardable.check_model(model)
    if mesh is None:
        shardable.check_whole(model)
    parts = shardable.blocks_of(model, blocks)
    reduce_dtype = shardable.reduce_dtype_of(wire, reduce_dtype)
    grid: Grid = Named(mesh, model, ties.trained(model, tied, mesh)) if isinstance(mesh, Mesh) else \
        Torch(mesh, model, timeout_s, watch)
    named = shardable.agreed(grid.alike, model, parts, {
        "stage": 3, "reduce_dtype": reduce_dtype, "param_dtype": param_dtype, "mesh": grid.shape,
        "reshard_after_forward": reshard_after_forward})
    if init_sync:
        grid.make_equal(model)
    policy = MixedPrecisionPolicy(param_dtype, reduce_dtype)
    units: list[Any] = grid.units(model, parts)
    for unit in units:
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=grid.mesh_of(unit[0]),
                    reshard_after_forward=reshard_after_forward, mp_policy=policy, **options)
        grid.divide(unit[0])
    shards = grid.shards()
    if shards.backend == "gloo":
        for part, *_ in units:
            part.set_custom_reduce_scatter(Scattered(shards))
            part.set_custom_all_gather(Gathered(shards))
    replaced.watch(model, [p for _, p in named])
    model.register_forward_hook(Watched(grid.everyone).after_forward)
    return Sharded(model, shards, grid)


class Sharded:
    """A model that `shard` has divided; make it with that.

    Attributes:
        module: the model itself.
        wire: of the ranks among which parameters are divided; on gloo gradients and parameters travel by it, and
            `wire.bytes` counts them. On NCCL they travel by torch.
        everyone: of all ranks; another one only if there are more axes than shards.
        terms: of how many ranks' losses a gradient is the mean.
    """

    def __init__(self, module: nn.Module, wire: Wire, grid: Grid):
        assert isinstance(module, FSDPModule)
        self.module, self.wire, self.everyone = module, wire, grid.everyone
        self.terms, self._grid, self._later = grid.terms, grid, Later(module)
        self._cut = grid.cut(module)
        self.elements = sum(self._cut.values())
        self._items = 0
        self._params = list(module.parameters())
        grid.widen(module)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within only accumulate, whole gradients on each rank; the next one outside reduces all."""
        self._check_arriving()
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def accumulate(self, micro_batches: int) -> Accumulation:
        """A context for each of several micro-batches of one step: only the last reduces; see `Accumulation`."""
        return Accumulation(self, micro_batches)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes within only accumulate, whole or in parts, as a pipeline's schedule makes them.

        Parameters stay gathered within. Then `finish` (or `reduce`, for those that are complete) reduces.
        """
        self._check_arriving()
        self._follow()
        with self._later.paused():
            yield

    def _follow(self) -> None:
        """`materialize` has put others in the place of parameters on meta, perhaps; all ranks call it alike."""
        now = list(self.module.parameters())
        if len(now) != len(self._params) or any(p is not known for p, known in zip(now, self._params, strict=True)):
            self._params = now
            self._grid.follow(self.module)

    def reduce(self, params: Iterable[Tensor] | None = None) -> None:
        """Take gradients that accumulate while `paused` as complete; every rank that holds parts of them calls it.

        Arguments:
            params: the parameters; what travels together is sent when all of it is complete. None: all that are left.
        """
        self._later.reduce(params)

    def finish(self) -> None:
        """End a step that was `paused`: what is left is reduced, and parameters are let go of."""
        self._later.finish()
        self._grid.tie()

    def statistics(self, optimizer: Any) -> tuple[Tensor, Tensor]:
        """Of the gradients of the whole model: the sum of squares (float64) and whether any is not finite.

        Each parameter is counted once, over all axes of the mesh, stages included; a collective of all ranks, with
        the same bits on each. `optimizer.clip_grad_norm_` and `LossScaler` get the same.
        """
        return optimizer.grad_statistics() if hasattr(optimizer, "grad_statistics") else clip.statistics([optimizer])

    def losses(self, loss: Tensor, stop: float = 0.0, items: int | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss over all ranks, and how many wish to stop; a collective of all ranks.

        Ranks along "tensor" have the same loss, of which the first one's counts, and of stages the last one's.

        Arguments:
            loss: of this rank, float64 of shape ().
            stop: 1 if this rank wishes to stop.
            items: by which the losses, as sums, are divided: this rank's. None: they are means.
        """
        once = self._grid.counts
        loss, items_of_all, stops = self.everyone.sum_(torch.stack([
            loss if once else torch.zeros_like(loss), loss.new_tensor(float(once * (items or 0))),
            loss.new_tensor(stop)]))
        return loss / (self.terms if items is None else items_of_all), stops

    def count(self, items: int) -> None:
        """Count items (tokens) whose losses were added up, not averaged, in this rank's backward passes of this step.

        `step` then divides by their number over all ranks: of ranks along "tensor", which have the same items, the
        first one's, of stages the last one's.
        """
        self._items += items

    def step(self, optimizer: Any, max_norm: float | None = None, scaler: LossScaler | None = None,
             unusable: Tensor | None = None) -> Tensor:
        """Step with the mean over all items that were counted on all ranks; every rank calls it.

        Arguments:
            optimizer: of this package, of the model's parameters.
            max_norm: clip the mean's norm to this.
            scaler: by which the losses were scaled, if they were; it is updated.
            unusable: bool of shape (), the same on every rank: something else is not finite (the loss).

        Returns:
            The norm of the mean gradient before clipping, float32 of shape (). Where something is not finite every
            rank skips the step.

        Raises:
            TypeError: the optimizer is not of this package.
            RuntimeError: no rank has counted anything.
        """
        if not hasattr(optimizer, "step_scaled"):
            raise TypeError(f"{type(optimizer).__name__} cannot divide by a number of items that is known late: take "
                            "one of fasttrain.optim, or average the loss on each rank and do not count()")
        mine = float(self._items if self._grid.counts else 0)
        items = self.everyone.sum_(torch.tensor(mine, dtype=torch.float64, device=self.everyone.device))
        self._items = 0
        if not items:
            raise RuntimeError("no items were counted on any rank: call count() before each backward pass, or "
                               "optimizer.step()")
        squares, found = self.statistics(optimizer)
        found = found if unusable is None else found | unusable
        return step_divided(items / self.terms, (squares, found), optimizer, max_norm, scaler)

    def bytes_per_step(self, gradient: float, parameter: float, micro_batches: int = 1) -> float:
        """Bytes that this rank sends in a step, by the formula: see `fasttrain.dist.accounting.bytes_per_step`.

        Arguments:
            gradient, parameter: bytes of an element on the wire.
            micro_batches: of a step. Each gathers the parameters twice; only the last reduces, over copies too.
        """
        sent = 0.0
        for copies, elements in self._cut.items():
            once = accounting.bytes_per_step(3, elements, self.wire.size, gradient, parameter)
            once += accounting.bytes_per_step(0, elements // self.wire.size, copies, gradient, 0)
            again = accounting.bytes_per_step(3, elements, self.wire.size, 0, parameter)
            sent += once + (micro_batches - 1) * again
        return sent

    def register_comm_hook(self, state: Any, hook: Any) -> None:
        """Refused: `fully_shard` has no hooks that could replace its reduction.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{getattr(hook, '__name__', hook)} cannot reduce the gradients of fully_shard: a hook such as "
                        "PowerSGD's keeps a state of the whole gradient on every rank. Use DataParallel")

    def _check_arriving(self) -> None:
        """One gradient arrives in a step, that of the last micro-batch: an optimizer must not wait for more."""
        for p in self.module.parameters():
            for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values():
                arrival = getattr(hook, "__self__", None)
                if isinstance(arrival, Arrival) and arrival.every > 1:
                    raise RuntimeError(f"step_on_arrival(accumulation={arrival.every}) waits for that many gradients "
                                       "in a step, and of a sharded model only one arrives, with all micro-batches in "
                                       "it: leave accumulation at 1")
