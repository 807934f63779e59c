"""Data parallelism as a module: what replaces torch's DistributedDataParallel in a script."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable

from fasttrain.dist.failures import first_words
from fasttrain.parallel import sharing, ties
from fasttrain.parallel.accumulate import Accumulation
from fasttrain.parallel.hooks import TorchHook
from fasttrain.parallel.join import Present, Shadow, ask
from fasttrain.parallel.reducer import MIB, Reducer
from fasttrain.parallel.tensor.partial import declare, declared
from fasttrain.precision.loss_scale import LossScaler


class DataParallel(nn.Module, Joinable):
    """Every rank holds the whole model; backward makes `p.grad` the mean over ranks.

    It takes the usual arguments of torch's DistributedDataParallel, by name, and has its attributes, so that a script
    changes its import only. Not taken: `mixed_precision`, `delay_all_reduce_named_params` and others that tune torch's
    own reducer. What it does not do as that: `state_dict` has the names of the bare module, and loads with or without
    their prefix; a backward pass is synchronised or not by where the backward pass runs, not the forward; and where
    ranks do not do the same, all of them raise in that step.

    Arguments:
        module: the same on every rank; parameters and buffers are those of the first rank after construction.
        device_ids, output_device, dim: of one-process-one-device training, as torch's; None or one device.
        broadcast_buffers: before each forward pass in training, buffers become those of the first rank.
        init_sync: send the first rank's parameters and buffers to all; False if they are equal for sure.
        process_group, device_mesh, mesh: the ranks: a ProcessGroup, a DeviceMesh, a `Wire` or a `Mesh`; see `Reducer`.
            On a `Mesh` every rank's module holds what is its own: parts of matrices, its stage, its experts. Made equal
            is what is to be, with the first rank that holds the same; buffers, between ranks along the axes of `MEAN`.
        bucket_cap_mb: size of the buckets in MiB; 25 by default.
        find_unused_parameters: has no effect: parameters that are not used are always found.
        gradient_as_bucket_view: has no effect: gradients always are views of their buckets.
        static_graph: see `Reducer`.
        wire, order, grad_dtype, timeout_s, watch, tied: see `Reducer`.

    Example:
        >>> from fasttrain.parallel import DataParallel  # was torch.nn.parallel's DistributedDataParallel
        >>> model = DataParallel(torch.nn.Linear(2, 1))                                 # doctest: +SKIP
        >>> model(torch.ones(4, 2)).sum().backward()                                    # doctest: +SKIP
    """

    def __init__(self, module: nn.Module, device_ids: list[Any] | None = None, output_device: Any = None, dim: int = 0,
                 broadcast_buffers: bool = True, init_sync: bool = True, process_group: Any = None,
                 bucket_cap_mb: float | None = None, find_unused_parameters: bool = False,
                 gradient_as_bucket_view: bool = True, static_graph: bool = False, device_mesh: Any = None,
                 mesh: Any = None, wire: Any = "same", order: Any = None, grad_dtype: torch.dtype | None = None,
                 timeout_s: float = 120, watch: Any = True, tied: Any = None):
        super().__init__()
        Joinable.__init__(self)
        given = [one for one in (mesh, device_mesh, process_group) if one is not None]
        if len(given) > 1:
            raise ValueError("mesh, device_mesh and process_group all name the ranks: give one of them")
        if device_ids is not None and len(device_ids) > 1:
            raise ValueError(f"device_ids is {device_ids}: a process trains on one device; start one for each")
        self.module = module
        self.broadcast_buffers, self.find_unused_parameters = broadcast_buffers, find_unused_parameters
        self.gradient_as_bucket_view, self.static_graph, self.dim = True, static_graph, dim
        self.device_ids, self.output_device = device_ids, output_device
        self._options = {"wire": wire, "order": order, "grad_dtype": grad_dtype, "static_graph": static_graph,
                         "timeout_s": timeout_s, "watch": watch,
                         "tied": ties.trained(module, tied, given[0] if given else None)}
        if bucket_cap_mb is not None:
            self._options |= {"bucket_bytes": int(bucket_cap_mb * MIB),
                              "first_bucket_bytes": int(min(bucket_cap_mb, 1) * MIB)}
        self._reduce(given[0] if given else None)
        if init_sync:
            sharing.share(self.reducer.reach, module, self._options["tied"])

    def _reduce(self, mesh: Any) -> None:
        self._one_graph: bool | None = None  # not looked yet
        self.reducer = Reducer(self.module.named_parameters(), mesh, **self._options)
        self.device, self.divide_by_all = self.reducer.wire.device, True

    def __getstate__(self) -> dict[str, Any]:
        """Without process groups, which cannot be pickled; what is made of it gets its own."""
        reducer = self.reducer
        state = {**self.__dict__, "_ranks": reducer.reach.mesh or reducer.method.grid or reducer.wire.ranks,
                 "_declared": [name for name, p in self.module.named_parameters() if declared(p)]}
        for name in ("reducer", "_join_config"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy reduces over the same ranks, all of which must make one."""
        ranks, adding = state.pop("_ranks"), state.pop("_declared")
        super().__setstate__(state)
        Joinable.__init__(self)
        for name in adding:
            declare(self.module.get_parameter(name))
        self._reduce(ranks)

    # --- torch's surface ----------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's own, after its buffers were made equal."""
        self.reducer.check_closed()
        if self._one_graph is not False:
            self._look_at_the_graph()
        if torch.is_grad_enabled() and self.training:
            joining = self._join_config.enable
            if joining:
                handle = Join.notify_join_context(self)
                if handle is not None:
                    handle.wait()
            self.before_forward(ask(self.reducer.wire, False, self.reducer.syncing) if joining else None)
        try:
            outputs = self.module(*inputs, **kwargs)
        except Exception as error:  # within backward torch ends a recomputation by one
            if self.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self.reducer.trouble(f"a forward pass ended with an exception: {first_words(error)}")
            raise
        self.reducer.expect(outputs)
        return outputs

    def _look_at_the_graph(self) -> None:
        """Say once what it costs that the whole model is one compiled graph: its gradients come all at its end."""
        if self._one_graph is None:
            compiled = type(self.module).__name__ == "OptimizedModule" or self.module._compiled_call_impl is not None
            self._one_graph = compiled and not self.reducer.idle and self.reducer.timeline is None
            if self._one_graph:
                self.reducer.record_timeline()
        elif self.reducer.sequence > 1 and self.reducer.timeline is not None:  # the first step compiles
            warnings.warn(f"the whole model is one compiled graph, whose gradients all come at its end: "
                          f"{self.reducer.exposed * 1e3:.1f} ms of communication were not hidden in the last step; "
                          "compile its blocks instead (docs/data-parallel.md)", stacklevel=3)
            self.reducer.record_timeline(False)
            self._one_graph = False

    def before_forward(self, present: Present | None = None) -> None:
        """What all ranks do together before a forward pass in training; `present`: those that have data (`join`)."""
        if present is not None and not self.divide_by_all:
            self.reducer.method.divisor = len(present.ranks)
        if self.broadcast_buffers and (self.reducer.syncing if present is None else present.syncing):
            sharing.broadcast(sharing.of_buffers(self.reducer.reach), self.module.buffers(),
                              0 if present is None else present.ranks[-1])

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes within only accumulate gradients here; see `Reducer.no_sync`."""
        return self.reducer.no_sync()

    def join(self, divide_by_initial_world_size: bool = True, enable: bool = True,
             throw_on_early_termination: bool = False) -> Join:
        """A context for uneven inputs: ranks that leave their loop early answer the others until all have left.

        Arguments:
            divide_by_initial_world_size: gradients are divided by all ranks; else by those that still have data.
            enable: without it the context does nothing.
            throw_on_early_termination: raise on all ranks as soon as one has no more data.
        """
        if not self.reducer.reach.single:
            raise RuntimeError("on a mesh several ranks work on one batch, which join() does not know of: give every "
                               "rank as many batches")
        if self.reducer.method.final:
            raise RuntimeError("a rank without data would have to follow the steps of Zero too, which join() does not "
                               "know of: give every rank as many batches")
        return Join([self], enable, throw_on_early_termination,
                    divide_by_initial_world_size=divide_by_initial_world_size)

    def join_hook(self, **options: Any) -> Shadow:
        """For torch's `Join`."""
        return Shadow(self, options.get("divide_by_initial_world_size", True))

    @property
    def join_device(self) -> torch.device:
        """For torch's `Join`."""
        return self.device

    @property
    def join_process_group(self) -> Any:
        """For torch's `Join`."""
        return self.reducer.wire.group

    def register_comm_hook(self, state: Any, hook: Any) -> None:
        """Let buckets travel by a hook with torch's signature, from the next backward pass on."""
        self.reducer.use(TorchHook(state, hook))

    def accumulate(self, micro_batches: int) -> Accumulation:
        """A context for each of several micro-batches of one step; see `Accumulation`."""
        return Accumulation(self.reducer, micro_batches)

    def count(self, items: int) -> None:
        """See `Reducer.count`."""
        self.reducer.count(items)

    def step(self, optimizer: Any, max_norm: float | None = None, scaler: LossScaler | None = None) -> Tensor:
        """See `Reducer.step`."""
        return self.reducer.step(optimizer, max_norm, scaler)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that lie in shards too (`Zero`)."""
        self.reducer.method.drop()
        super().zero_grad(set_to_none)

    def finish(self) -> Any:
        """See `Reducer.finish`."""
        return self.reducer.finish()

    def grad_norm(self) -> Tensor:
        """See `Reducer.grad_norm`."""
        return self.reducer.grad_norm()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the bare module."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load that of the bare module, or one whose names all begin with `module.`, as torch writes it."""
        if state_dict and all(name.startswith("module.") for name in state_dict):
            own = set(self.module.state_dict())
            if not own.issuperset(state_dict):
                state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__["_modules"].get("module")
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    # --- Buffers ------------------------------------------------------------------------------------------------------

    def broadcast(self, tensors: list[Tensor], source: int = 0) -> None:
        """Replace tensors by those of a rank: one collective for each dtype."""
        sharing.broadcast(self.reducer.wire, tensors, source)
