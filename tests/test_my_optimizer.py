"""An optimizer of a user's own: the example, and what the base class does with a page."""

import pickle
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT, assert_same_bits, usable
from torch.nn import Parameter

from fasttrain.kernels import dispatch, native
from fasttrain.optim import Adam, AdamW, Lion, Optimizer

EXAMPLE = ROOT / "examples" / "my_optimizer.py"
BACKENDS = [name for name in dispatch.BACKENDS if dispatch.BACKENDS[name][1] != ("cuda",)]


def example(monkeypatch: pytest.MonkeyPatch, backend: str) -> dict:
    monkeypatch.setenv("FASTTRAIN_BACKEND", backend)
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLE))


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 30


def test_the_example_has_the_same_bits_on_every_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = example(monkeypatch, "reference")
    assert wanted["loss"].item() < 0.2  # it was 1
    for backend in BACKENDS:
        if reason := usable(backend):
            print(f"{backend}: {reason}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # nothing falls back on the reference
            found = example(monkeypatch, backend)
        if backend == "cpu":
            assert native.number_of(found["MyOptimizer"].rules[0]) is not None
        for p, q in zip(found["model"].parameters(), wanted["model"].parameters(), strict=True):
            assert_same_bits(p, q, backend)
            assert_same_bits(found["optimizer"].state[p]["square_avg"], wanted["optimizer"].state[q]["square_avg"])


class Own(Optimizer):
    """At the top level, as pickle wants it."""

    state = ("average",)

    def coefficients(step, lr):  # a page may leave out @staticmethod
        return dict(rate=lr / step)

    def element(p, g, average, k):
        average = average + g
        return p - k.rate * average, average

    def __init__(self, params, lr=1.0, **options):
        super().__init__(params, dict(lr=lr), **options)


def stepped(optimizer: Optimizer, p: Parameter, steps: int) -> Parameter:
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p


@pytest.mark.parametrize("backend", [None, "reference"])
def test_steps_are_counted_where_coefficients_read_them(backend: str | None) -> None:
    assert Own.counts_steps
    p = Parameter(torch.zeros(3))
    optimizer = Own([p], backend=backend)
    stepped(optimizer, p, 3)
    assert p.tolist() == [-3.0] * 3  # 1/1 + 2/2 + 3/3
    assert optimizer.state[p]["step"].item() == 3
    assert optimizer.state[p]["step"].dtype == torch.float32


def test_a_checkpoint_and_a_pickle_go_on() -> None:
    p, q, r = (Parameter(torch.zeros(3)) for _ in range(3))
    whole, first = Own([p]), Own([q])
    stepped(whole, p, 4)
    stepped(first, q, 2)
    second = Own([r])
    r.data.copy_(q.data)
    second.load_state_dict(first.state_dict())
    assert_same_bits(stepped(second, r, 2), p)
    third = pickle.loads(pickle.dumps(first))
    (s,) = third.param_groups[0]["params"]
    assert_same_bits(stepped(third, s, 2), p)


def test_what_counts_steps() -> None:
    def page(coefficients, **more):
        return type("Page", (Optimizer,), dict(state=(), coefficients=staticmethod(coefficients),
                                               element=staticmethod(lambda p, g, k: p - k.lr * g), **more))

    def inside(step, lr):
        return {name: value / step for name, value in {"lr": lr}.items()}

    assert page(lambda step, lr: dict(lr=lr / step)).counts_steps
    assert page(inside).counts_steps
    assert page(lambda t, lr: dict(lr=lr / t)).counts_steps
    assert not page(lambda step, lr: dict(lr=lr)).counts_steps
    assert page(lambda step, lr: dict(lr=lr), counts_steps=True).counts_steps
    assert not page(inside, counts_steps=False).counts_steps
    assert (Lion.counts_steps, Adam.counts_steps, AdamW.rules) == (False, True, Adam.rules)


def test_a_page_that_changes_a_part_of_another() -> None:
    class Slower(Own):
        def coefficients(step, lr):
            return dict(rate=lr / (2 * step))

    class Renamed(Own):
        """No part of the equation: the same rule."""

    assert Renamed.rules is Own.rules
    assert Slower.rules[0].name == "Slower"
    p = Parameter(torch.zeros(1))
    assert stepped(Slower([p]), p, 3).item() == -1.5


@pytest.mark.parametrize("part", ["state", "coefficients"])
def test_an_incomplete_page_is_refused(part: str) -> None:
    parts = dict(state=(), coefficients=lambda step, lr: {}, element=lambda p, g, k: p - g)
    del parts[part]
    with pytest.raises(TypeError, match=f"class Page has no `{part}`: an optimizer gives"):
        type("Page", (Optimizer,), parts)


def test_a_page_without_an_equation_is_refused() -> None:
    with pytest.raises(TypeError, match="Empty has no equation: an optimizer gives `state`"):
        type("Empty", (Optimizer,), {})([Parameter(torch.ones(1))], {})


def test_options_that_nobody_knows_are_refused() -> None:
    with pytest.raises(TypeError, match="Own has no option 'momentun'"):
        Own([Parameter(torch.ones(1))], momentun=0.9)


def test_a_mistake_in_an_equation_names_its_line() -> None:
    class Squared(Own):
        def element(p, g, average, k):
            return p - k.rate * g**2, average

    p = Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    optimizer = Squared([p])
    with pytest.raises(TypeError, match=r"test_my_optimizer.py:\d+: return p - k.rate \* g\*\*2.*: a power is outside"):
        optimizer.step()
    assert p.item() == 1.0
    assert not optimizer.state[p]


def test_the_cpu_is_where_it_is_compiled() -> None:
    """A parameter elsewhere does not wait for a kernel of this processor."""
    assert CPU.type == "cpu"
    assert not native.is_built(Own.rules[0])
