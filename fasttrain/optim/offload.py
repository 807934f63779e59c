"""States on the host and parameters on a GPU: gradients come down in buckets, the CPU steps, parameters go up.

The optimizer that the user holds (the outer one) has the GPU's parameters, the groups and the states. Beside it stands
an inner one of the same class, whose parameters are copies in pinned memory, their *twins*; it has the outer one's
states and options. It is an optimizer on the CPU like any other, so every equation, storage and check is the same, and
so are the bits.

    down       bucket 0 | bucket 1 | bucket 2
    CPU                 | step 0   | step 1   | step 2
    up                             | bucket 0 | bucket 1 | bucket 2

The GPU's current stream waits for the copies up, the host does not.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels.link import Link, Pairs
from fasttrain.optim import pinned
from fasttrain.optim.checks import check_gradient, reals
from fasttrain.optim.flight import Bucket, Flights, Member
from fasttrain.optim.local import is_dtensor
from fasttrain.optim.part import pass_on
from fasttrain.optim.report import StepReport
from fasttrain.optim.twin import check, give, inner, links, parameters, places, refuse, share


class Host:
    """What an offloaded optimizer has on the host.

    Raises:
        RuntimeError: there is not enough pinned memory.
        TypeError: a parameter, or an option, does not go together with offloading.
    """

    def __init__(self, optimizer: Any) -> None:
        self._outer = weakref.ref(optimizer)
        self.params, self.places = parameters(optimizer), places(optimizer)
        self.links = links(self.params)
        refuse(optimizer, self.params, self.links)
        away = {number: link for number, link in enumerate(self.links) if link is not None}
        link = next(iter(away.values()))
        self.needs = pinned.needs(optimizer, [self.places[number] for number in away], optimizer.offload_bucket)
        self.flights = Flights(link, self.needs.gradients // max(1, self.needs.slots), self.needs.slots)
        copies = [{"p": pinned.array(p, p.dtype)} for p in (self.params[number] for number in away)]
        kept = [pinned.states(optimizer, self.places[number]) for number in away]
        memory = [pinned.pin(link, size, what, "keep states in fewer bytes (docs/storage.md)")
                  for size, what in ((self.needs.parameters, "copies of parameters"), (self.needs.states, "states"))]
        made = zip(away, pinned.laid_out(memory[0], copies), pinned.laid_out(memory[1], kept), strict=True)
        self.twins = [p.detach() for p in self.params]
        self.homes: dict[int, dict[str, Tensor]] = {}
        for number, copy, homes in made:
            self.twins[number], self.homes[number] = copy["p"], homes
            pass_on(self.params[number], copy["p"])
        self.number = {id(p): number for number, p in enumerate(self.params)}
        self.inner = inner(optimizer, self.twins)
        self.lock = threading.RLock()  # gradients of several devices arrive on threads of their own
        self.open: Bucket | None = None  # what arrives before a step, until it sets out
        self.stepped: set[int] = set()
        self.checked: dict[int, tuple[tuple[Any, ...], pinned.Array]] = {}
        self.seen: list[tuple[int, int] | None] = [None] * len(self.params)  # of parameters as they were sent up
        self.fetch(away)

    # --- The outer optimizer and the inner one ------------------------------------------------------------------------

    @property
    def outer(self) -> Any:
        optimizer = self._outer()
        assert optimizer is not None  # it owns this
        return optimizer

    def take_over(self) -> None:
        """Give the inner optimizer the outer one's options and states."""
        share(self.outer.param_groups, self.inner.param_groups)
        for number, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            state = self.outer.state.get(p)
            if state is not self.inner.state.get(twin):
                if state is None:
                    del self.inner.state[twin]
                else:
                    self.inner.state[twin] = self.settled(number, state)

    def hand_over(self, numbers: Iterable[int]) -> None:
        """Give the outer optimizer the inner one's options and states."""
        for number in numbers:
            state = self.inner.state.get(self.twins[number])
            if state is not None:
                self.outer.state[self.params[number]] = self.settled(number, state)
        share(self.inner.param_groups, self.outer.param_groups)

    def settled(self, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """The states of a parameter, which are in pinned memory now."""
        pinned.settle(state, self.homes.get(number, {}))
        return state

    # --- Parameters that somebody else wrote --------------------------------------------------------------------------

    def now(self, number: int) -> tuple[int, int]:
        return self.params[number].data_ptr(), self.params[number]._version

    def written(self, numbers: Iterable[int]) -> list[int]:
        """Those that are not as they were sent up."""
        return [number for number in numbers
                if self.links[number] is not None and self.now(number) != self.seen[number]]

    def from_gpu(self, numbers: Iterable[int]) -> Pairs:
        return [(self.twins[number], self.params[number].detach()) for number in numbers]

    def fetch(self, numbers: Iterable[int]) -> None:
        """Bring parameters down that somebody else wrote."""
        by_link: dict[Link, list[int]] = {}
        for number in self.written(numbers):
            by_link.setdefault(self.links[number], []).append(number)  # type: ignore[arg-type]
        for link, found in by_link.items():
            self.flights.wait_for_sending()
            link.wait(link.down(self.from_gpu(found), [link.mark()]))
            for number in found:
                self.seen[number] = self.now(number)

    # --- A step -------------------------------------------------------------------------------------------------------

    def step(self, scale: float, report: StepReport) -> None:
        """Step every parameter that has a gradient, and what a step does afterwards."""
        with self.lock:
            self.take_over()
            land = partial(self.land, scale, report)
            try:
                self.close(scale, report)
                self.flights.push(None, land, report)  # what has arrived is stepped, whatever else cannot be
                buckets = self.gather()
                check(self.inner, [(self.twins[member.number], member.grad if bucket.link is None else
                                    self.flights.view(bucket.link, 0, 0, member.landed))
                                   for bucket in buckets for member in bucket.members])
                for bucket in (*buckets, None):
                    self.flights.push(self.complete(bucket), land, report)
            finally:
                self.flights.drain()
            resting = [number for number, (g, _) in enumerate(self.places) if number not in self.stepped
                       and self.inner.param_groups[g].get("ema_decay") is not None]
            self.fetch(resting)  # their averages follow them
            self.inner._arrived.update(id(self.twins[number]) for number in self.stepped)
            self.stepped.clear()
            self.inner.stepped()
            self.inner._finish(report)
            self.hand_over(resting)

    def arrive(self, p: Tensor, scale: float) -> None:
        """Step a parameter whose gradient is complete, together with others that arrive."""
        with self.lock:
            number = self.number[id(p)]
            member, link, report = self.member(number), self.links[number], StepReport()
            if self.open is not None and (self.open.link is not link or number in self.open.numbers or
                                          self.open.bytes + member.landed.bytes > self.outer.offload_bucket):
                self.close(scale, report)
            self.open = self.open or Bucket(link)
            self.open.members.append(member)
            if link is not None:
                self.open.after.append(link.mark())

    def close(self, scale: float, report: StepReport) -> None:
        """Have what has arrived set out."""
        bucket, self.open = self.open, None
        if bucket is not None:
            self.take_over()
            self.flights.push(self.complete(bucket), partial(self.land, scale, report), report)

    def member(self, number: int) -> Member:
        """A parameter with its gradient, which is checked."""
        p, name = self.params[number], self.inner._name(self.places[number])
        grad: Any = p.grad
        signature = (grad.dtype, grad.shape, grad.stride(), grad.device, grad.layout, type(grad), grad.is_neg(),
                     grad.is_conj(), p.device, p.dtype, p.shape)
        if number not in self.checked or self.checked[number][0] != signature:
            if grad.layout != torch.strided:
                raise TypeError(f"{name} has a gradient of layout {grad.layout}: offload=True takes dense ones; give "
                                "the parameter an optimizer of its own, without it")
            if is_dtensor(grad):
                raise TypeError(f"{name} is no DTensor, and its gradient is one: give it grad.full_tensor()")
            check_gradient(name, p, grad)
            reals(name, p.detach(), grad, (), {})
            self.checked[number] = signature, pinned.array(grad, grad.dtype)
        return Member(number, grad.detach().resolve_conj().resolve_neg(), self.checked[number][1])

    def gather(self) -> list[Bucket]:
        """The gradients that are there, in buckets."""
        made: list[Bucket] = []
        by_link: dict[Link | None, list[Member]] = {}
        for number, p in enumerate(self.params):
            if p.grad is not None:
                by_link.setdefault(self.links[number], []).append(self.member(number))
        for link, found in by_link.items():
            after = [] if link is None else [link.mark()]
            rest = iter(found)
            for count in pinned.buckets([member.landed.bytes for member in found], self.outer.offload_bucket):
                made.append(Bucket(link, [next(rest) for _ in range(count)], after))
        return made

    def complete(self, bucket: Bucket | None) -> Bucket | None:
        """With the parameters that somebody else wrote."""
        if bucket is not None:
            bucket.more = self.from_gpu(self.written(member.number for member in bucket.members))
        return bucket

    def land(self, scale: float, report: StepReport, bucket: Bucket) -> Pairs:
        """Step a bucket whose gradients are here; what is to be sent up."""
        twins = [self.twins[member.number] for member in bucket.members]
        for twin, grad in zip(twins, bucket.views, strict=True):
            give(twin, grad)
        try:
            self.inner._pass(scale, report)
        finally:
            for twin in twins:
                twin.grad = None
        self.hand_over(bucket.numbers)
        self.stepped |= bucket.numbers
        if bucket.link is None:
            return ()
        for member in bucket.members:
            if self.inner.param_groups[self.places[member.number][0]].get("zero_gradients"):
                member.grad.zero_()
        return self.to_gpu(bucket.numbers)

    def to_gpu(self, numbers: Iterable[int]) -> Pairs:
        """What sends parameters up. They count as written from here on."""
        pairs = []
        for number in numbers:
            p = self.params[number]
            torch.autograd.graph.increment_version(p)
            self.seen[number] = self.now(number)
            pairs.append((p.data, self.twins[number]))
        return pairs

    # --- What goes out and comes back ---------------------------------------------------------------------------------

    def as_it_is(self) -> Any:
        """The inner optimizer, its parameters and states as those of the outer one are now."""
        with self.lock:
            self.take_over()
            self.fetch(range(len(self.params)))
            return self.inner

    def load_full_precision(self, weights: Iterable[Tensor]) -> None:
        """As the optimizer's; the host waits until the parameters are on their device."""
        with self.lock:
            self.as_it_is().load_full_precision([weight.cpu() for weight in weights])
            self.flights.wait_for_sending()
            for number, link in enumerate(self.links):
                if link is not None:
                    link.wait(link.up(self.to_gpu([number]), [link.mark()]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Load into the memory of the host; the states and the groups that the outer optimizer has then.

        Torch's way would bring every state to its parameter's device first, where there is no room for them.
        """
        with self.lock:
            self.inner.load_state_dict(state_dict)
            state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
            for number, (p, twin) in enumerate(zip(self.params, self.twins, strict=True)):
                if twin in self.inner.state:
                    state[p] = self.settled(number, self.inner.state[twin])
            groups = zip(self.outer.param_groups, self.inner.param_groups, strict=True)
            return {"state": state, "param_groups": [{**loaded, "params": own["params"]} for own, loaded in groups]}


def current(optimizer: Any, host: Host | None) -> Host | None:
    """The host's side of an optimizer for its parameters as they are now; None if the host has them all itself."""
    params = parameters(optimizer)
    if host is not None and len(params) == len(host.params) and all(map(same, params, host.params, host.links)):
        return host
    return None if all(link is None for link in links(params)) else Host(optimizer)


def same(p: Tensor, known: Tensor, link: Link | None) -> bool:
    """Whether a parameter is the known one, where it was."""
    return p is known and p.device == (known.device if link is None else link.device)
