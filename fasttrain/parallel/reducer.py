"""Gradients averaged over ranks while backward still runs: buckets, sent in a fixed order as they fill.

The oracle is `fasttrain.parallel.naive`. The life of a gradient is in `buckets`, how a bucket travels in `wires`, what
the ranks compare at the end of each step in `fasttrain.dist.control`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.layout import FlatLayout
from fasttrain.dist.mesh import Mesh
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.watching import wire_over
from fasttrain.kernels import norm
from fasttrain.optim.local import local
from fasttrain.parallel import blame, reduced, steps
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.carried import bucket_of
from fasttrain.parallel.grouped import grouped
from fasttrain.parallel.hierarchy import ranks_and_method
from fasttrain.parallel.items import Items
from fasttrain.parallel.over_axes import Reach
from fasttrain.parallel.timeline import Timeline
from fasttrain.parallel.told import Told
from fasttrain.parallel.vouching import Vouching
from fasttrain.parallel.widened import widen
from fasttrain.parallel.wires import Method

MIB = 1 << 20


class Reducer(Vouching, Items, Told):
    """Averages the gradients of parameters over the ranks of a mesh, in the backward pass itself.

    After a backward pass, `p.grad` is the mean over ranks, as after torch's DistributedDataParallel; a parameter that
    no rank used keeps None. Under `no_sync()` gradients only accumulate here.

    Arguments:
        params: parameters, or (name, parameter) pairs, the same on every rank in the same order; those that require no
            gradient are left out, tied ones count once.
        mesh: a `Mesh`; or, for data parallelism alone, a `Wire`, a DeviceMesh, a ProcessGroup, or None for all ranks.
            On a `Mesh` parameters may be DTensors, and each is added up over the ranks that `fasttrain.parallel.groups`
            names. Over a DeviceMesh of two dimensions (across nodes, inside a node) gradients travel as
            `fasttrain.parallel.hierarchy` has it.
        wire: how gradients travel, by its name in `fasttrain.parallel.wires`, or a `Method` of yours; on a mesh with
            several groups of parameters the class of one.
        bucket_bytes, first_bucket_bytes: sizes of buckets (`fasttrain.dist.layout`).
        order: names in the order in which gradients arrive, `recorded_order` of an earlier run, for example; None: the
            reverse of `params`.
        grad_dtype: of the buckets; None: each parameter's own. float32 for parameters of 16 bits adds up micro-batches
            and ranks in float32; it needs a torch whose tensors have `grad_dtype`.
        static_graph: every step uses the same parameters as often as the first one, which counts them: for parameters
            within several re-entrant checkpoints.
        timeout_s: seconds after which a rank that does not answer is given up.
        watch: True: one thread of this process tells the other ranks if it fails, and hears if they do, so that all
            raise or end with the cause (docs/failures.md); or a Watcher of yours; False: none. Of a `Wire` or a `Mesh`
            that is given: what that has, and its timeout.
        tied: of parameters that lie on several stages of a pipeline, by their names on this one: the stages. All stages
            give all ties, those of other stages too, in one order.

    Attributes:
        reach: the wires and groups of its ranks.
        layout: the `FlatLayout` of the buckets.
        sequence: synchronised steps so far.
        last: the `Outcome` of the last one that was read, or None.
        timeline: of the last step, where `record_timeline` was called.

    Raises:
        TypeError, ValueError: a parameter that cannot be reduced, or that another reducer has; an unknown option.
        DisagreementError: the ranks have different parameters or options; the same text on every rank.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> reducer = Reducer(model.named_parameters(), mesh)                           # doctest: +SKIP
        >>> model(torch.ones(4, 2)).sum().backward()                                    # doctest: +SKIP
        >>> reducer.grad_norm()                                                         # doctest: +SKIP
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[tuple[str, Tensor]], mesh: Any = None, *,
                 wire: str | Method = "same", bucket_bytes: int = 25 * MIB, first_bucket_bytes: int = MIB,
                 order: Sequence[str] | None = None, grad_dtype: torch.dtype | None = None,
                 static_graph: bool = False, timeout_s: float = 120, watch: Watcher | bool = True,
                 tied: Mapping[str, Sequence[int]] | None = None):
        axes = mesh if isinstance(mesh, Mesh) else None
        given: list[Any] = list(params)
        named = reduced.trained(given, axes)
        reduced.check_memory(named)
        other = [p for _, p in named if grad_dtype not in (None, p.dtype)]
        if other and not hasattr(other[0], "grad_dtype"):
            raise ValueError(f"grad_dtype={grad_dtype} needs a torch whose tensors have grad_dtype, newer than "
                             f"{torch.__version__}: leave it out, or keep the parameters in {grad_dtype}")
        if axes is None:
            if tied:
                raise ValueError("tied parameters lie on stages of a pipeline: give the Mesh that has them")
            mesh, method = ranks_and_method(mesh, wire)
            reach = Reach(wire_over(mesh, named[0][1].device, timeout_s, watch), len(named))
        else:
            reach = Reach.over(axes, named, tied or {})
            method = grouped(wire, reach)
        layout = FlatLayout.of(reach.entries(named), reach.worlds, order=reach.order(named, order),
                               bucket_bytes=bucket_bytes, first_bucket_bytes=first_bucket_bytes,
                               bucket_dtype=grad_dtype)
        reach.agree(named, layout, {"wire": method.name, "grid": method.grid, "static_graph": static_graph})
        self.idle = reach.wire.size == 1 and reach.across is None and not other and method.name == "same"
        super().__init__(named, reach, layout, static_graph)
        self.use(method)
        for p in other:
            p.grad_dtype = None  # any: the first comes in the parameter's own, and is cast as it is packed
        reduced.own(self.params, self)
        if axes is not None and not reach.single:
            frozen = [one for one in given if isinstance(one, tuple) and not one[1].requires_grad]
            widen(axes, axes.wire(use="norms"), [*named, *frozen], tied or {})
        self._hooks: list[Any] = []
        if not self.idle:
            self._attach()
        steps.watch(self)

    # --- What users call ----------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within only accumulate; the next one outside sends all. It is the backward that counts."""
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before

    def shadow(self) -> None:
        """Answer the others' synchronised step as a rank without data (`join`): nothing of its own counts."""
        for p in self.params:
            p.grad = None
        self._backwards = 0
        self._start()
        self._finish(late=False)

    def grad_ready(self, p: Tensor) -> None:
        """Tell that a gradient is complete, where no hook of autograd does (a pipeline that splits backward)."""
        self._arrive(self._index[p])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Of the reduced gradients: the sum of squares (float64) and whether any element is not finite; of shape ().

        On a `Mesh` of those of all its ranks together, each parameter once. Each rank measured its part while buckets
        arrived: the same bits on every rank. Do not use them if something else has written to the gradients since
        (torch's GradScaler, for example).
        """
        if self.idle:
            squares, found = norm.squares([local(p.grad) for p in self.params if p.grad is not None])
            return norm.total(squares), found
        if self._squares is None:
            raise RuntimeError("no gradients have been reduced: run a backward pass outside of no_sync() first")
        return self._squares

    def grad_norm(self) -> Tensor:
        """The norm of all reduced gradients, float32 of shape (); see `statistics`."""
        return self.statistics()[0].sqrt().float()

    @property
    def culprits(self) -> dict[int, list[str]]:
        """By rank, the parameters whose gradients were not finite there, found in the second bad step in a row."""
        return self.blaming.culprits

    def nonfinite(self) -> list[str]:
        """The parameters whose reduced gradients are not finite now, by name: one pass, when you ask."""
        if self.method.final:
            raise RuntimeError("no rank has the reduced gradients of whole parameters (Zero): see `culprits`")
        return blame.nonfinite(self.names, self.params)

    def recorded_order(self) -> list[str]:
        """The names in the order in which gradients arrived in the last backward pass: an `order` for later runs."""
        seen = set(self._arrivals)
        return [self.names[index] for index in
                (*self._arrivals, *(index for index in reversed(range(len(self.names))) if index not in seen))]

    @property
    def exposed(self) -> float:
        """Seconds of communication in the last recorded step that its backward pass did not hide."""
        return 0.0 if self.idle or self.timeline is None else self.timeline.exposed

    def bytes_per_step(self) -> float:
        """Bytes that this rank sends in a synchronised step, by the formula; `wire.bytes` counts what it sent."""
        return sum(self.method.of(bucket.group).bytes_of(bucket.elements, bucket.dtype)
                   for bucket in self.layout.buckets)

    @property
    def sent(self) -> int:
        """Bytes that this rank has put on its wires, of all groups."""
        return sum(wire.sent for wire in self.reach.everyone)

    @property
    def waited(self) -> float:
        """Seconds for which the host has waited for them."""
        return sum(wire.waits.seconds for wire in self.reach.everyone)

    def record_timeline(self, on: bool = True) -> None:
        """Record when each bucket is ready, sent and received, in `timeline`."""
        self.timeline = Timeline(len(self.buckets)) if on else None

    def use(self, method: Method) -> None:
        """Let buckets travel this way from the next step on; on every rank.

        Raises:
            RuntimeError: an optimizer relies on the way that they travel (`Zero`).
            ValueError: there are several groups of parameters, and this serves one.
        """
        if hasattr(self, "method") and self.method.final:
            raise RuntimeError(f"gradients travel as {self.method.name!r}, on which an optimizer relies: give the wire "
                               "when the model is wrapped, before the optimizer is made")
        method = method if self.reach.single or method.final else grouped(method, self.reach)
        method.prepare(self.wire, self.layout)
        self.method = method
        for bucket in self.buckets:
            bucket.stage(method.of(bucket.plan.group).staging(bucket.data.dtype))

    def shard(self, method: Method, make: Callable[..., Bucket] | None = None) -> None:
        """Let every rank get its part of each bucket only, from now on: what `Zero` calls.

        Arguments:
            method: that sends and keeps the parts.
            make: makes the buckets anew, with the arguments of `Bucket`; None: they stay.
        """
        self.use(method)
        was_idle, self.idle = self.idle, False
        if make is not None or was_idle:
            self._make_buckets(make or partial(bucket_of, self.reach))
        self._attach()

    def _attach(self) -> None:
        if not self._hooks:
            self._hooks = [p.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self), index))
                           for index, p in enumerate(self.params)]

    def remove(self) -> None:
        """Let go of the parameters; gradients stay as they are."""
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            bucket.release()
        reduced.disown(self.params)
        steps.forget(self)

    def check_closed(self) -> None:
        """A forward pass begins, or a step.

        Raises:
            RuntimeError: the last backward pass has not come to its end, so that the other ranks wait for its
                gradients: they are told.
        """
        self.goes_on()
        if self._open is None or torch._C._current_graph_task_id() != -1:
            return
        cause = str(self.broken)
        if isinstance(self.wire.watch, Watcher):
            self.wire.watch.fail(cause)
        raise RuntimeError(f"{cause}. The ranks cannot go on together: let the exception end the process, and start "
                           "again")

    def before_step(self) -> None:
        """An optimizer is about to step these parameters.

        Raises:
            RuntimeError: it would not divide by the items that were counted.
        """
        self.check_closed()
        if self._late_items or (self.idle and self._items):
            raise RuntimeError("items were counted in this step, and optimizer.step() would not divide by them: call "
                               "step(optimizer) of the reducer or of DataParallel")


def _arrived(reducer: weakref.ref[Reducer], index: int, p: Tensor) -> None:
    if (self := reducer()) is not None:
        self._arrive(index)
