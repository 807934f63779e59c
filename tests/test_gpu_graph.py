"""Whole steps on a real GPU that the host never waits for, and the same in CUDA graphs: all bits are the eager ones.

The models are sums of elementwise products, whose gradients have the same bits wherever they are computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, generator, needs_native, normal
from stored import same, states
from test_driven import STORAGES
from torch import Tensor
from torch.nn import Parameter

from fasttrain import LossScaler, StepGraph
from fasttrain.kernels import cuda, dispatch, native
from fasttrain.optim import (
    ASGD,
    LAMB,
    SGD,
    SOAP,
    Adam,
    AdamW,
    Lion,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    ScheduleFreeAdamW,
    StableAdamW,
)

pytestmark = [pytest.mark.gpu, needs_native]
GPU = torch.device("cuda", 0)
SHAPES = ((5,), (300, 70), (9001,), (1 << 17,))
OVERFLOWS = (0, 4, 6)
STEPS = 9
MAX_NORM = 0.5


@pytest.fixture(params=("cuda", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    assert dispatch.load(request.param).why_not(GPU) is None
    return request.param


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Training:
    """A model that is no model, a schedule, a dynamic loss scale, a norm to be clipped to, gradients that overflow."""

    def __init__(self, kind: type[Optimizer], backend: str, dtype: torch.dtype = torch.float32, **options: Any):
        numbers = generator(9)
        self.params = [Parameter(normal(shape, torch.float32, numbers).to(GPU, dtype)) for shape in SHAPES]
        groups = [dict(params=self.params[:3]), dict(params=self.params[3:])]
        self.optimizer = kind(groups, backend=backend, **options)
        self.scaler = LossScaler(2.0**12, growth_interval=3)
        self.used = 0  # steps whose batch uses all parameters follow the first

    def backward(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        used = self.params if self.used else self.params[1:]
        self.used += 1
        loss = torch.stack([(p.float() * x[index]).square().mean() for index, p in enumerate(used)]).sum()
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, x: Tensor) -> Tensor:
        """Driven by the device."""
        loss = self.backward(x)
        self.scaler.step(self.optimizer, max_norm=MAX_NORM)
        return loss

    def host_step(self, x: Tensor) -> Tensor:
        """The same, driven by the host, which reads every number."""
        loss = self.backward(x)
        square, found = self.optimizer.grad_statistics()
        norm = square.sqrt().float() / self.scaler._scale
        self.optimizer.step_scaled(self.scaler._scale.cpu(), found.cpu(), norm.cpu(), MAX_NORM)
        self.scaler.update(found)
        return loss

    def schedule(self, step: int) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = 0.1 / (1 + step + index)
            if group.get("weight_decay"):
                group["weight_decay"] = 0.1 + 0.01 * step


def batch(step: int) -> Tensor:
    x = normal((len(SHAPES),), torch.float32, generator(70 + step))
    x[1] = float("inf") if step in OVERFLOWS else x[1]
    return x.to(GPU)


def run(kind: type[Optimizer], backend: str, how: str, steps: int = STEPS, **options: Any) -> Training:
    """`how`: "host", "device", "graph"."""
    training = Training(kind, backend, **options)
    made: Any = {"host": training.host_step, "device": training.step}.get(how)
    made = made or StepGraph(training.step, training.optimizer, warmup=3)
    first = 1 if kind in (ASGD,) else 0  # its states are made with the learning rate of the first step, made or not
    for step in range(first, steps):
        training.schedule(step)
        x = batch(step)
        if step < first + 3:
            made(x)
        else:
            if how == "graph" and step == first + 3:
                made.capture(x)
            with no_waiting() if how != "host" else torch.enable_grad():
                made(x)
            assert how == "graph" or training.optimizer.last_step.driven == (how == "device")
            assert how == "host" or training.optimizer.last_step.host_syncs == 0
    return training


def compare(got: Training, wanted: Training, what: str) -> None:
    same([p.detach() for p in got.params], [p.detach() for p in wanted.params], what)
    here, there = ([{key: value.cpu() for key, value in state.items()} for state in states(one.optimizer, one.params)]
                   for one in (got, wanted))
    same(here, there, what)
    assert got.scaler.get_scale() == wanted.scaler.get_scale()
    for ours, theirs in zip(*(one.optimizer.state_dict()["param_groups"] for one in (got, wanted)), strict=True):
        for key in ("draws", "k", "lr_max"):
            assert ours.get(key) == theirs.get(key), f"{what}: {key}"
        if "weight_sum" in ours:  # powers of a device are within a unit in the last place of those of the C library
            assert ours["weight_sum"] == pytest.approx(theirs["weight_sum"], rel=1e-14, abs=0), what


KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (AdamW, dict(weight_decay=0.1)), "Adam": (Adam, dict(weight_decay=0.1, amsgrad=True)), "Lion": (Lion, {}),
    "SGD": (SGD, dict(lr=0.1, momentum=0.9, dampening=0.5)), "NAdam": (NAdam, {}), "ASGD": (ASGD, dict(t0=2)),
    "RAdam": (RAdam, {}), "ScheduleFreeAdamW": (ScheduleFreeAdamW, dict(warmup_steps=3)),
    "LAMB": (LAMB, dict(weight_decay=0.1)), "StableAdamW": (StableAdamW, {}),
    "zeroed": (AdamW, dict(zero_gradients=True, clip_each=0.2, ema_decay=0.9)),
    "double": (AdamW, dict(dtype=torch.float64))}
KINDS |= {name: (AdamW, dict(options, dtype=torch.bfloat16)) for name, options in STORAGES.items()}


@pytest.mark.parametrize("name", KINDS)
def test_replays_have_the_bits_of_eager_steps_and_these_those_of_the_host(name: str, backend: str):
    """Unscale, check, norm, clip, step, EMA, schedule, dynamic loss scale; nothing waits after the first steps."""
    kind, options = KINDS[name]
    wanted = run(kind, backend, "host", **options)
    for how in ("device", "graph"):
        compare(run(kind, backend, how, **options), wanted, f"{name}, {how}")


def test_muon(backend: str):
    """Newton-Schulz in a graph, between two rules."""
    ends = []
    for how in ("device", "graph"):
        numbers = generator(2)
        params = [Parameter(normal(shape, torch.bfloat16, numbers).to(GPU)) for shape in ((64, 32), (64, 32), (32, 96))]
        optimizer, scaler = Muon(params, lr=0.02, backend=backend, capturable=True), LossScaler()

        def step(x: Tensor, params=params, optimizer=optimizer, scaler=scaler) -> None:
            optimizer.zero_grad()
            loss = torch.stack([(p.float() * x[index]).square().mean() for index, p in enumerate(params)]).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer, max_norm=MAX_NORM)

        made: Any = step if how == "device" else StepGraph(step, optimizer, warmup=3)
        for number in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + number)
            made(batch(number))
            assert optimizer.last_step.driven
        ends.append([p.detach() for p in params])
    same(*ends, "Muon")


def test_a_bare_graph_with_a_learning_rate_on_the_device(backend: str):
    """capturable=True and steps before the capture are all that it takes."""
    rate = torch.tensor(0.1, device=GPU)
    got, wanted = (Training(AdamW, backend, capturable=True, lr=rate) for _ in range(2))
    x = torch.zeros(len(SHAPES), device=GPU)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(3):
            x.copy_(batch(step))
            rate.fill_(0.1 / (1 + step))
            got.step(x)
            wanted.step(x)
    torch.cuda.current_stream().wait_stream(stream)
    with pytest.warns(UserWarning, match=r"betas, eps, weight_decay of AdamW are Python numbers"), \
            torch.cuda.graph(graph):
        got.step(x)
    for step in range(3, STEPS):
        x.copy_(batch(step))
        rate.fill_(0.1 / (1 + step))
        with no_waiting():
            graph.replay()
            wanted.step(x)
    compare(got, wanted, "bare graph")


def test_eager_steps_between_replays(backend: str):
    """Other gradients, at other addresses, by tables of their own."""
    got, wanted = Training(AdamW, backend), Training(AdamW, backend)
    graph = StepGraph(got.step, got.optimizer, warmup=2)
    for step in range(STEPS + 3):
        for one in (got, wanted):
            one.schedule(step)
        kept = [torch.empty(1 << 16, device=GPU) for _ in range(step)]  # so that gradients lie elsewhere
        wanted.step(batch(step))
        (got.step if step > 4 and step % 2 else graph)(batch(step))
        del kept
    compare(got, wanted, "between")


def test_a_state_that_is_loaded_goes_on(backend: str):
    """Counts on the device are saved as torch's capturable ones are, and loaded either way."""
    got, wanted = run(AdamW, backend, "graph", steps=6), run(AdamW, backend, "host", steps=6)
    host, device = Training(AdamW, backend), Training(AdamW, backend)
    for other, source in ((host, got), (device, wanted)):
        for p, q in zip(other.params, source.params, strict=True):
            p.data.copy_(q.data)
        other.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
        other.scaler.load_state_dict(source.scaler.state_dict())
        other.used = 1
    for step in range(6, STEPS):
        for one, function in ((host, host.host_step), (device, device.step)):
            one.schedule(step)
            function(batch(step))
    compare(host, device, "loaded")


def test_gradients_are_freed_between_steps(backend: str):
    """What a step keeps for the next is no gradient."""
    training = run(AdamW, backend, "device", steps=4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(GPU)
    grads = sum(p.grad.nbytes for p in training.params if p.grad is not None)
    training.optimizer.zero_grad()
    assert before - torch.cuda.memory_allocated(GPU) >= grads


def test_what_cannot_be_captured_is_named():
    p = Parameter(torch.ones(64, 64, device=GPU))
    optimizer = SOAP([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: SOAP"), \
            torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert_same_bits(p.detach().cpu(), before.cpu())
    ours = AdamW([p])
    with pytest.raises(RuntimeError, match="no step before was driven by the device"), \
            torch.cuda.graph(torch.cuda.CUDAGraph()):
        ours.step()
    assert not ours.state
    assert_same_bits(p.detach().cpu(), before.cpu())
