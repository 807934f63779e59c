"""Gradients averaged over ranks while backward still runs: buckets, sent in a fixed order as they fill.

The oracle is `fasttrain.parallel.naive`. The life of a gradient is in `buckets`, how a bucket travels in `wires`, what
the ranks compare at the end of each step in `agreement`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist.fingerprint import agree, fingerprint
from fasttrain.dist.layout import Entry, FlatLayout
from fasttrain.dist.wire import Wire
from fasttrain.kernels import norm
from fasttrain.parallel import reduced, steps
from fasttrain.parallel.agreement import Agreeing, Agreement, Done
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.timeline import Timeline
from fasttrain.parallel.wires import Method, Sent, method_of, total

MIB = 1 << 20
engine = torch.autograd.Variable._execution_engine


class Reducer:
    """Averages the gradients of parameters over the ranks of a mesh, in the backward pass itself.

    After a backward pass, `p.grad` is the mean over ranks, as after torch's DistributedDataParallel; a parameter that
    no rank used keeps None. Under `no_sync()` gradients only accumulate here.

    Arguments:
        params: parameters, or (name, parameter) pairs, the same on every rank in the same order; those that require no
            gradient are left out, tied ones count once.
        mesh: a `Wire`, a one-dimensional DeviceMesh, a ProcessGroup, or None for all ranks.
        wire: how gradients travel, by its name in `fasttrain.parallel.wires`, or a `Method` of yours.
        bucket_bytes, first_bucket_bytes: sizes of buckets (`fasttrain.dist.layout`).
        order: names in the order in which gradients arrive, `recorded_order` of an earlier run, for example; None: the
            reverse of `params`.
        grad_dtype: of the buckets; None: each parameter's own. float32 for parameters of 16 bits adds up micro-batches
            and ranks in float32; it needs a torch whose tensors have `grad_dtype`.
        static_graph: every step uses the same parameters as often as the first one, which counts them: for parameters
            within several re-entrant checkpoints.

    Attributes:
        layout: the `FlatLayout` of the buckets.
        sequence: synchronised steps so far.
        last: the `Agreement` of the last one that was read, or None.
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
                 static_graph: bool = False):
        named = reduced.trained(params)
        self.names, self.params = [name for name, _ in named], [p for _, p in named]
        other = [p for p in self.params if grad_dtype not in (None, p.dtype)]
        if other and not hasattr(other[0], "grad_dtype"):
            raise ValueError(f"grad_dtype={grad_dtype} needs a torch whose tensors have grad_dtype, newer than "
                             f"{torch.__version__}: leave it out, or keep the parameters in {grad_dtype}")
        self.wire = mesh if isinstance(mesh, Wire) else Wire(self.params[0].device, group=mesh)
        method = method_of(wire)
        self.layout = FlatLayout.of(
            [Entry.of(name, p) for name, p in named], self.wire.size, order=order, bucket_bytes=bucket_bytes,
            first_bucket_bytes=first_bucket_bytes, bucket_dtype=grad_dtype)
        agree(self.wire, fingerprint(self.layout.entries, self.layout,
                                     {"wire": method.name, "static_graph": static_graph}))
        self.sequence = 0
        self.last: Agreement | None = None
        self.timeline: Timeline | None = None
        self.syncing = True          # what the next backward pass does: `no_sync`
        self.joined = False
        self._open: bool | None = None  # within a backward pass: whether it is synchronised
        self._backwards = 0          # since the last synchronised step
        self._counts, self._counting = [0] * len(named), static_graph
        self._agreeing: Agreeing | None = None
        self._squares: tuple[Tensor, Tensor] | None = None
        self._arrivals: list[int] = []
        self._make_buckets(Bucket)
        self.method: Method = None  # type: ignore[assignment]
        self.use(method)
        for p in other:
            p.grad_dtype = None  # any: the first comes in the parameter's own, and is cast as it is packed
        reduced.own(self.params, self)
        self._hooks: list[Any] = []
        self.idle = self.wire.size == 1 and not other and method.name == "same"
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

    def finish(self) -> Agreement | None:
        """End the step where no synchronised backward pass did: send what there is, and compare what the ranks did.

        `optimizer.step()` calls it for parameters that were not reduced, so that a rank without a gradient answers the
        others.

        Raises:
            RanksDisagree: they did not do the same; on every rank, and no gradient is to be trusted.
        """
        if self.idle:
            self.sequence += 1
            return None
        if self._open is not None:
            raise RuntimeError("finish() was called within a backward pass, or the last one ended with an exception "
                               "after gradients were sent: the ranks cannot go on together; start them again")
        self.method.begin()
        self._start()
        self._finish(late=True)
        return self.last

    def shadow(self) -> None:
        """Answer the others' synchronised step as a rank without data (`join`): nothing of its own counts."""
        self.joined = True
        for p in self.params:
            p.grad = None
        self._backwards = 0
        self.method.begin()
        self._start()
        self._finish(late=False)

    def grad_ready(self, p: Tensor) -> None:
        """Tell that a gradient is complete, where no hook of autograd does (a pipeline that splits backward)."""
        self._arrive(self._index[p])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Of the reduced gradients: the sum of squares (float64) and whether any element is not finite; of shape ().

        Each rank measured its part while buckets arrived: the same bits on every rank. Do not use them if something else
        has written to the gradients since (torch's GradScaler, for example).
        """
        if self.idle:
            squares, found = norm.squares([p.grad for p in self.params if p.grad is not None])
            return norm.total(squares), found
        if self._squares is None:
            raise RuntimeError("no gradients have been reduced: run a backward pass outside of no_sync() first")
        return self._squares

    def grad_norm(self) -> Tensor:
        """The norm of all reduced gradients, float32 of shape (); see `statistics`."""
        return self.statistics()[0].sqrt().float()

    def recorded_order(self) -> list[str]:
        """The names in the order in which gradients arrived in the last backward pass: an `order` for later runs."""
        seen = set(self._arrivals)
        return [self.names[index] for index in
                (*self._arrivals, *(index for index in reversed(range(len(self.names))) if index not in seen))]

    def record_timeline(self, on: bool = True) -> None:
        """Record when each bucket is ready, sent and received, in `timeline`."""
        self.timeline = Timeline(len(self.buckets)) if on else None

    def use(self, method: Method) -> None:
        """Let buckets travel this way from the next step on; on every rank.

        Raises:
            RuntimeError: the way that they travel is for good (`Zero`).
        """
        if self.method is not None and self.method.final:
            raise RuntimeError(f"gradients travel as {self.method.name!r}, on which an optimizer relies: give the wire "
                               "when the model is wrapped, before the optimizer is made")
        method.prepare(self.wire, self.layout)
        self.method = method

    def shard(self, method: Method, make: Callable[..., Bucket] | None = None) -> None:
        """Let every rank get its part of each bucket only, from now on: what `Zero` calls.

        Arguments:
            method: that sends and keeps the parts.
            make: makes the buckets anew, with the arguments of `Bucket`; None: they stay.
        """
        self.use(method)
        if make is not None:
            self._make_buckets(make)
        self.idle = False
        self._attach()

    def remove(self) -> None:
        """Let go of the parameters; gradients stay as they are."""
        for hook in self._hooks:
            hook.remove()
        reduced.disown(self.params)
        steps.forget(self)

    # --- A backward pass ----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        if not self._hooks:
            self._hooks = [p.register_post_accumulate_grad_hook(partial(_arrived, weakref.ref(self), index))
                           for index, p in enumerate(self.params)]

    def _make_buckets(self, make: Callable[..., Bucket]) -> None:
        self._index = {p: index for index, p in enumerate(self.params)}
        self._shapes = [p.shape for p in self.params]
        self._where: list[tuple[Bucket, int]] = [None] * len(self.params)  # type: ignore[list-item]
        place = {name: index for index, name in enumerate(self.names)}
        self.buckets: list[Bucket] = []
        for plan in self.layout.buckets:
            indices = [place[slot.name] for slot in plan.slots]
            bucket = make(plan, [self.params[i] for i in indices], [self.names[i] for i in indices])
            for at, index in enumerate(indices):
                self._where[index] = bucket, at
            self.buckets.append(bucket)

    def _arrive(self, index: int) -> None:
        """A gradient is there, as far as this backward pass goes."""
        if self._open is None:
            self._begin()
        self._arrivals.append(index)
        if self._counting:
            self._counts[index] += 1
            return
        if self._left and self._left[index] > 1:
            self._left[index] -= 1
            return
        bucket, place = self._where[index]
        if not self._open:
            bucket.take(place, 1.0)
            return
        bucket.arrive(place, self._factor)
        if self.timeline is not None:
            self.timeline.look()
        if not bucket.waiting:
            self._send_ready()

    def _begin(self) -> None:
        """The first gradient of a backward pass."""
        self._backwards += 1
        self._arrivals = []
        self._left = list(self._counts) if any(self._counts) else []
        self.method.begin()
        if self.syncing:
            self._start()
        self._open = self.syncing
        engine.queue_callback(self._ended)

    def _start(self) -> None:
        """A synchronised step begins."""
        self._read_agreement()
        self._works: list[Sent] = []
        self._squares = None
        self._factor = self.method.factor
        for bucket in self.buckets:
            bucket.begin()
        if self.timeline is not None:
            self.timeline.begin()

    def _send_ready(self) -> None:
        """Send, in the layout's order, every bucket that is full and whose turn it is."""
        while (turn := len(self._works)) < len(self.buckets) and not self.buckets[turn].waiting:
            self._works.append(self.method.send(turn, self.buckets[turn]))
            if self.timeline is not None:
                self.timeline.sent(turn, self._works[turn])

    def _ended(self) -> None:
        """Autograd is done; or only the inner backward pass of a re-entrant checkpoint."""
        if (node := torch._C._current_autograd_node()) is not None:
            node.register_hook(lambda *_: engine.queue_callback(self._ended))
        elif self._open is not None:
            if self._open:
                self._counting = False
                self._finish(late=False)
            self._open = None

    def _finish(self, late: bool) -> None:
        if self.timeline is not None:
            self.timeline.backward_ended()
        self._check_unchanged()
        used = [bucket.has(place) for bucket, place in self._where]
        for bucket in self.buckets[len(self._works) :]:
            bucket.close(self._factor)
        self._send_ready()
        parts = [work.wait() for work in self._works]
        done = Done(self.sequence, self._backwards, self.method.checksum, sum(used), int(late), int(self.joined))
        self._agreeing = Agreeing(self.wire, done, total(parts), used)
        self.sequence, self._backwards = self.sequence + 1, 0
        squares, bad = self._agreeing.sums
        self._squares = squares, bad != 0
        if self.timeline is not None:
            self.timeline.ended()
        anywhere = used
        if self._agreeing.copied is None or not all(used):
            anywhere = [ranks > 0 for ranks in self._read_agreement().used]
        for (bucket, place), had, elsewhere in zip(self._where, used, anywhere, strict=True):
            if elsewhere and not had:
                bucket.bind(place)
        self.method.ended(anywhere)

    def _read_agreement(self) -> Any:
        """Compare what the ranks did: at once on the CPU, a step later on a GPU, which is not waited for."""
        if self._agreeing is not None:
            agreeing, self._agreeing = self._agreeing, None
            self.last = agreeing.read()
        return self.last

    def _check_unchanged(self) -> None:
        for name, p, shape in zip(self.names, self.params, self._shapes, strict=True):
            if not p.requires_grad or p.shape != shape:
                raise RuntimeError(f"{name} was {'resized' if p.requires_grad else 'frozen'} after it was wrapped: wrap "
                                   "the model again, on every rank")


def _arrived(reducer: weakref.ref[Reducer], index: int, p: Tensor) -> None:
    if (self := reducer()) is not None:
        self._arrive(index)
