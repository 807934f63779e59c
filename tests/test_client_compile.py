"""torch.compile around forward and backward, around the step, and around both, against the same with torch's optimizer.

A step of ours is one call of compiled code already: in a compiled function it breaks the graph and runs as it is.
"""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from clients import F64, OURS, PAIRS, Make, assert_close_run, batches, model_of, named, squared_error
from helpers import assert_same_run
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(make: Make, wrap: Callable[..., Callable[..., Any]],
          build: Callable[[], torch.nn.Module] = model_of) -> dict[str, Tensor]:
    """`wrap` makes the training step of (model, optimizer)."""
    model = build()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)  # a compiled step must not freeze the rate
    step = wrap(model, optimizer)
    for batch in batches(STEPS):
        step(batch)
        schedule.step()
    return named(model, optimizer)


def plain(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = squared_error(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    return step


def compiled_gradients(model: torch.nn.Module, optimizer: torch.optim.Optimizer, backend: str) -> Callable[..., Tensor]:
    """The usual way: a compiled model, the step outside."""
    return plain(torch.compile(model, backend=backend), optimizer)


def compiled_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, backend: str) -> Callable[..., Tensor]:
    """torch's recipe for its own optimizers."""
    compiled = torch.compile(lambda: optimizer.step(), backend=backend)

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = squared_error(model, batch)
        loss.backward()
        compiled()
        return loss

    return step


def compiled_method(model: torch.nn.Module, optimizer: torch.optim.Optimizer, backend: str) -> Callable[..., Tensor]:
    optimizer.step = torch.compile(optimizer.step, backend=backend)  # type: ignore[method-assign]
    return plain(model, optimizer)


def compiled_closure(model: torch.nn.Module, optimizer: torch.optim.Optimizer, backend: str) -> Callable[..., Tensor]:
    def closure(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = squared_error(model, batch)
        loss.backward()
        return loss

    return torch.compile(lambda batch: optimizer.step(lambda: closure(batch)), backend=backend)


def compiled_all(model: torch.nn.Module, optimizer: torch.optim.Optimizer, backend: str) -> Callable[..., Tensor]:
    return torch.compile(plain(model, optimizer), backend=backend)


WAYS = [compiled_gradients, compiled_step, compiled_method, compiled_closure, compiled_all]


@pytest.mark.filterwarnings("error:.*[Dd]ynamo")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_compiled_run_ends_as_with_torch(name: str, way: Callable[..., Any]) -> None:
    """The backend runs what was traced as it is: the bits of the run that was not compiled."""
    got = train(OURS[name], lambda model, optimizer: way(model, optimizer, "aot_eager"))
    assert_same_run(got, train(OURS[name], plain), name)
    assert_close_run(got, train(PAIRS[name][1], plain))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own import of inductor
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's eager run: compiled, torch's AdamW takes its bias corrections in fp32 (2e-8 in the weights)."""
    def one_layer() -> torch.nn.Module:  # the C++ compiler takes seconds for each piece of code
        torch.manual_seed(1)
        return torch.nn.Linear(6, 3, dtype=F64)

    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes
    got = train(OURS["AdamW"], lambda model, optimizer: compiled_all(model, optimizer, "inductor"), one_layer)
    assert_close_run(got, train(PAIRS["AdamW"][1], plain, one_layer))


@pytest.mark.parametrize("name", PAIRS)
def test_a_whole_graph_is_refused_and_nothing_was_changed(name: str) -> None:
    model = model_of(F64)
    optimizer = OURS[name](model.parameters())
    squared_error(model, batches(1)[0]).backward()
    before = named(model, optimizer)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fasttrain"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    assert_same_run(named(model, optimizer), before, name)
    optimizer.step()
    assert not torch.equal(model[0].weight, before["0.weight"])
