"""The equations are the right ones: torch.optim in every configuration of its own tests, and Lion's paper, retold."""

import copy
import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from helpers import Case, assert_same_bits, generator, normal, run, ulp, usable
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import OPTIMIZERS, Adam, Lion

pytest.importorskip("expecttest", reason="torch's optim_db needs expecttest")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

OURS = {"Adam": Adam, **{ours.__name__: ours for ours in OPTIMIZERS if hasattr(torch.optim, ours.__name__)}}
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in OURS}
assert INFOS.keys() == OURS.keys()


def options(name: str) -> dict[str, dict[str, Any]]:
    """Torch's configurations by description: also those that it keeps for GPUs, which on a CPU mean the same."""
    inputs = [*INFOS[name].optim_inputs_func(device="cpu"), *INFOS[name].optim_inputs_func(device="cuda")]
    # A tensor lr keeps torch's whole computation in the tensor's precision: the witness gets one of float64.
    return {i.desc: {key: double(value) for key, value in i.kwargs.items() if key != "capturable"} for i in inputs}


def double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if isinstance(value, Tensor) else value


ROWS = [(name, desc) for name in OURS for desc in options(name)]
EXTRA: dict[tuple[str, str], dict[str, Any]] = {
    ("SGD", "all at once"): dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, maximize=True),
    ("SGD", "nesterov, maximize"): dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True),
    ("Adam", "decoupled"): dict(weight_decay=0.3, decoupled_weight_decay=True),
    ("Adam", "L2, amsgrad, maximize"): dict(weight_decay=0.3, amsgrad=True, maximize=True),
    ("AdamW", "amsgrad, maximize"): dict(weight_decay=0.3, amsgrad=True, maximize=True),
    ("AdamW", "first betas"): dict(betas=(0.0, 0.0), eps=1e-3),
    ("AdamW", "plain numbers"): dict(lr=1, weight_decay=0, eps=0.1),
    ("Adadelta", "all at once"): dict(lr=2.0, rho=0.7, eps=1e-4, weight_decay=0.1, maximize=True),
    ("Adagrad", "all at once"): dict(lr=0.1, lr_decay=0.3, weight_decay=0.1, initial_accumulator_value=0.2, eps=1e-3,
                                     maximize=True),
    ("Adamax", "all at once"): dict(lr=0.1, betas=(0.7, 0.8), eps=0.1, weight_decay=0.1, maximize=True),
    ("ASGD", "averages early"): dict(lr=0.1, lambd=0.1, alpha=0.6, t0=2, weight_decay=0.1, maximize=True),
    ("ASGD", "averages at once"): dict(t0=-3),
    ("NAdam", "all at once"): dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, momentum_decay=0.2,
                                   maximize=True),
    ("NAdam", "decoupled, maximize"): dict(weight_decay=0.3, decoupled_weight_decay=True, maximize=True),
    ("RAdam", "rectified at once"): dict(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, maximize=True),
    ("RAdam", "decoupled, maximize"): dict(weight_decay=0.3, decoupled_weight_decay=True, maximize=True),
    ("RMSprop", "all at once"): dict(lr=0.1, alpha=0.7, eps=1e-3, weight_decay=0.1, momentum=0.8, centered=True,
                                     maximize=True),
    ("RMSprop", "momentum, maximize"): dict(momentum=0.8, weight_decay=0.1, maximize=True),
    ("Rprop", "narrow, maximize"): dict(lr=0.1, etas=(0.3, 1.7), step_sizes=(0.03, 0.15), maximize=True),
}
ROWS += list(EXTRA)


def pair(name: str, desc: str, dtype: torch.dtype, numbers: torch.Generator) -> Any:
    """Ours and torch's with equal parameters in two groups."""
    kwargs = EXTRA.get((name, desc)) or options(name)[desc]
    shapes = ((3, 4), (7,), (), (2, 1, 5))
    values = [normal(shape, dtype, numbers) for shape in shapes]
    both = []
    for optimizer in (OURS[name], INFOS[name].optim_cls):
        params = [Parameter(value.clone()) for value in values]
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.01, "lr": 0.02}]
        extra = {} if optimizer is OURS[name] else {"foreach": False}
        both.append((optimizer(groups, **copy.deepcopy(kwargs), **extra), params))
    return both


def give_gradients(step: int, dtype: torch.dtype, numbers: torch.Generator, *lists: list[Parameter]) -> None:
    """The same gradients to all; the second parameter is frozen at first, the third for a while, some are missing."""
    for i, same in enumerate(zip(*lists, strict=True)):
        frozen = (i == 1 and step < 3) or (i == 2 and 4 <= step < 7)
        grad = normal(same[0].shape, dtype, numbers)
        for p in same:
            p.requires_grad_(not frozen)
            p.grad = None if frozen or (i + step) % 6 == 5 else grad.clone()


def close(got: Tensor, wanted: Tensor, relative: float, what: str) -> None:
    """Relative to the element, or to 1, the size of the numbers that were added up, where the sum is near zero."""
    error = (got.detach() - wanted.detach()).abs() / wanted.detach().abs().clamp_min(1)
    assert got.dtype == wanted.dtype
    assert bool((error <= relative).all()), f"{what}: relative error {error.max().item():.1e}"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("name", "desc"), ROWS)
def test_float64_agrees_with_torch(name: str, desc: str, backend: str) -> None:
    if reason := usable(backend):
        pytest.skip(reason)
    numbers = generator(1)
    (ours, mine), (theirs, torchs) = pair(name, desc, torch.float64, numbers)
    ours.backend = backend
    for step in range(10):
        give_gradients(step, torch.float64, numbers, mine, torchs)
        ours.step()
        theirs.step()
        for p, q in zip(mine, torchs, strict=True):
            close(p, q, 1e-12, f"step {step}")
            assert ours.state[p].keys() == theirs.state[q].keys()
            for key, value in theirs.state[q].items():
                close(ours.state[p][key], value, 1e-12, f"step {step}, {key}")


@pytest.mark.parametrize("kind", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize(("name", "desc"), ROWS)
def test_complex_numbers_agree_with_torch(name: str, desc: str, kind: torch.dtype) -> None:
    numbers = generator(2)
    (ours, mine), (theirs, torchs) = pair(name, desc, torch.float64, numbers)
    for optimizer, params in ((ours, mine), (theirs, torchs)):
        for group in optimizer.param_groups:
            group["params"] = [Parameter(torch.complex(p.data, p.data.flip(0) if p.dim() else -p.data).to(kind))
                               for p in group["params"]]
        params[:] = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(5):
        for p, q in zip(mine, torchs, strict=True):
            grad = torch.complex(normal(p.shape, torch.float64, numbers), normal(p.shape, torch.float64, numbers))
            p.grad = grad.to(kind).conj()  # lazily conjugated, which torch's own Adam refuses
            q.grad = p.grad.resolve_conj()
        ours.step()
        theirs.step()
        # complex64: both round each of five steps in fp32; a few of its units (6e-8) for each of them.
        for p, q in zip(mine, torchs, strict=True):
            tolerance = 1e-12 if kind == torch.complex128 else 5e-6
            close(torch.view_as_real(p), torch.view_as_real(q), tolerance, desc)


# --- fp32 and 16 bits: against one float64 step from the same state ---------------------------------------------------

# Units in the last place of the largest term by which one step may be off. A term c x has two roundings, of c (at most
# one unit of the term, half a unit of c) and of the product (half a unit); a sum of two terms has one more. So a moment
# is off by 3.5 at most; p of Lion by 1.5 + 1.5 + 0.5; SGD and Adam add to that the errors of their update, which are
# counted in its own size, below p's. 16 bits: fp32, rounded once: half a unit and what fp32 adds, 2^-8 of one or less.
# RMSprop's buffer adds a quotient of a gradient (2) and a root (half of 3.5, and 1) to that. Adadelta squares such a
# quotient, which doubles its error. Rprop multiplies a step size once; its first one is a state, rounded when made.
FP32 = {**dict.fromkeys(OURS, 4.0), "Lion": 3.5, "RMSprop": 6.0, "Adadelta": 8.0, "Rprop": 2.5}
ONE_ROUNDING = 0.51
SIXTEEN_BITS = {**dict.fromkeys(OURS, ONE_ROUNDING), "Rprop": 1.01}


def in_float64(optimizer: Any, params: list[Parameter], witness: Any) -> list[Parameter]:
    """Give the witness the parameters, states and gradients as they are, in float64."""
    exact = [Parameter(p.detach().double()) for p in params]
    numbered = iter(exact)
    for group in witness.param_groups:
        group["params"] = [next(numbered) for _ in group["params"]]
    witness.state.clear()
    for p, q in zip(params, exact, strict=True):
        q.grad = None if p.grad is None else p.grad.double()
        witness.state[q] = {key: value.clone() if key in ("step", *optimizer.running) else value.double()
                            for key, value in optimizer.state[p].items()}
        if not witness.state[q]:
            del witness.state[q]
    return exact


def check_step(optimizer: Any, params: list[Parameter], witness: Any, dtype: torch.dtype, bound: float) -> None:
    """Step both; the error of each number is counted in units of the largest term that was added to make it."""
    exact = in_float64(optimizer, params, witness)
    before = [{"p": q.detach().clone()} | {k: v.clone() for k, v in witness.state[q].items()} if q in witness.state
              else {"p": q.detach().clone()} for q in exact]
    optimizer.step()
    witness.step()
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for p, q, old, group in zip(params, exact, before, groups, strict=True):
        exact_state = {k: v.detach() for k, v in witness.state.get(q, {}).items()}
        new = {"p": (p, q), **{k: (optimizer.state[p][k], v) for k, v in exact_state.items()}}
        decayed = group.get("weight_decay", 0) * old["p"].abs()
        added = terms(group, old, exact_state, torch.zeros(()) if q.grad is None else q.grad.abs() + decayed)
        for key, (got, wanted) in new.items():
            got, wanted = got.detach().double(), wanted.detach().double()
            scale = torch.maximum(torch.maximum(old.get(key, wanted).abs(), wanted.abs()), added[key])
            off = ((got - wanted).abs() / ulp(scale, dtype)).max().item()
            assert off <= bound, f"{key} is off by {off:.2f} ulp"


def terms(group: dict[str, Any], old: dict[str, Tensor], new: dict[str, Tensor], g: Tensor) -> dict[str, Any]:
    """The size of what was added to make each number, given that of the gradient with its decay."""
    a1, a2 = (1 - float(beta) for beta in group.get("betas", (0, 0)))
    mean, lr = 1 - group.get("alpha", group.get("rho", 0)), float(group["lr"])
    divided = g  # what a momentum buffer adds up
    if "square_avg" in new:
        variance = new["square_avg"] - (new["grad_avg"] ** 2 if "grad_avg" in new else 0)
        divided = g / (variance.sqrt() + group["eps"])
    if "acc_delta" in new:
        before = old.get("acc_delta", new["acc_delta"] * 0)
        divided = ((before + group["eps"]) / (new["square_avg"] + group["eps"])).sqrt() * g
    moved = lr * (1 + g + old.get("momentum_buffer", divided).abs() + divided)
    return {"p": moved, "ax": old["p"].abs() + moved, "exp_avg": a1 * g, "exp_avg_sq": a2 * g * g,
            "max_exp_avg_sq": a2 * g * g, "exp_inf": g, "sum": g * g, "square_avg": mean * g * g, "grad_avg": mean * g,
            "acc_delta": mean * divided**2, "momentum_buffer": divided,
            **dict.fromkeys(("step", "mu_product", "eta", "mu", "prev", "step_size"), g * 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "desc"), ROWS)
def test_one_step_is_within_units_in_the_last_place(name: str, desc: str, dtype: torch.dtype) -> None:
    numbers = generator(4)
    (ours, mine), (theirs, _) = pair(name, desc, dtype, numbers)
    for step in range(10):
        give_gradients(step, dtype, numbers, mine)
        check_step(ours, mine, theirs, dtype, (FP32 if dtype == torch.float32 else SIXTEEN_BITS)[name])


# --- Lion -------------------------------------------------------------------------------------------------------------

def paper(weight: Tensor, gradient: Tensor, momentum: Tensor, lr: float, beta1: float, beta2: float,
          weight_decay: float) -> tuple[Tensor, Tensor]:
    """arXiv 2302.06675, program 1, line by line: returns the update and the momentum."""
    def interp(x: Tensor, y: Tensor, a: float) -> Tensor:
        return (1 - a) * x + a * y

    update = interp(gradient, momentum, beta1)
    update = torch.sign(update)
    momentum = interp(gradient, momentum, beta2)
    decayed = weight * weight_decay
    update = update + decayed
    update = update * lr
    return update, momentum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lion_is_the_papers(decay: float, maximize: bool, dtype: torch.dtype) -> None:
    numbers = generator(6)
    p = Parameter(normal((40, 5), dtype, numbers))
    optimizer = Lion([p], lr=0.02, betas=(0.9, 0.98), weight_decay=decay, maximize=maximize)
    optimizer.state[p] = {"exp_avg": torch.zeros(40, 5, dtype=dtype)}
    for step in range(10):
        p.grad = None if step == 4 else normal(p.shape, dtype, numbers)
        weight, momentum = (t.detach().to(torch.float64, copy=True) for t in (p, optimizer.state[p]["exp_avg"]))
        optimizer.step()
        if p.grad is None:
            assert_same_bits(p, weight.to(dtype))
            continue
        gradient = -p.grad.double() if maximize else p.grad.double()
        update, momentum = paper(weight, gradient, momentum, 0.02, 0.9, 0.98, decay)
        bound = ONE_ROUNDING if dtype == torch.bfloat16 else FP32["Lion"]
        terms = torch.maximum(weight.abs(), (weight - update).abs()).clamp_min(0.02)
        assert ((p.detach().double() - (weight - update)).abs() / ulp(terms, dtype)).max() <= bound, f"step {step}"
        terms = torch.maximum(momentum.abs(), 0.02 * gradient.abs())
        assert ((optimizer.state[p]["exp_avg"].double() - momentum).abs() / ulp(terms, dtype)).max() <= bound


def test_lion_starts_from_zero_momentum() -> None:
    p = Parameter(torch.tensor([1.0, 1.0, 1.0]))
    p.grad = torch.tensor([0.25, -8.0, 0.0])
    optimizer = Lion([p], lr=0.5, betas=(0.5, 0.75))
    optimizer.step()
    assert p.tolist() == [0.5, 1.5, 1.0]
    assert optimizer.state[p]["exp_avg"].tolist() == [0.0625, -2.0, 0.0]


# --- Errors -----------------------------------------------------------------------------------------------------------

ERRORS = [(name, i) for name in OURS for i in range(len(INFOS[name].optim_error_inputs_func("cpu", torch.float32)))]


def failing(optimizer: Any, given: Any) -> BaseException:
    params = given.params if given.params is not None else [Parameter(torch.ones(2, 3))]
    with pytest.raises(Exception) as error, warnings.catch_warnings():  # noqa: PT011, PT012
        warnings.simplefilter("error")
        optimizer(params, **given.kwargs)
    return error.value


@pytest.mark.parametrize(("name", "index"), ERRORS)
def test_the_errors_of_torch(name: str, index: int) -> None:
    wrong = INFOS[name].optim_error_inputs_func("cpu", torch.float32)[index]
    assert wrong.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    ours, theirs = (failing(optimizer, copy.deepcopy(wrong.optimizer_error_input))
                    for optimizer in (OURS[name], INFOS[name].optim_cls))
    assert type(ours) is type(theirs) is wrong.error_type
    assert str(ours) == str(theirs)
    assert re.search(wrong.error_regex, str(ours), re.S)


MORE_ERRORS = [
    *itertools.product(["Adam", "AdamW"], [dict(eps=-1e-8), dict(betas=(0.9, 1.0)), dict(betas=(-0.1, 0.9)),
                                           dict(lr=float("nan")), dict(betas=(0.9, torch.tensor([0.9, 0.9])))]),
    *itertools.product(["SGD"], [dict(nesterov=True), dict(nesterov=True, momentum=0.9, dampening=0.1),
                                 dict(weight_decay=-0.1)]),
    *itertools.product(["Adam", "AdamW", "SGD", "Adagrad"],
                       [dict(fused=True, foreach=True), dict(fused=True, differentiable=True)]),
    *itertools.product(OURS, [dict(lr=-1.0), dict(lr=torch.tensor([0.1, 0.2]))]),
    *itertools.product(sorted(OURS.keys() - {"Rprop"}), [dict(weight_decay=-0.1)]),
    *itertools.product(["Adamax", "NAdam", "RAdam"], [dict(eps=-1e-8), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -1))]),
    *itertools.product(["Adadelta", "Adagrad", "RMSprop"], [dict(eps=-1e-8)]),
    ("Adadelta", dict(rho=1.1)), ("Adagrad", dict(lr_decay=-1)), ("Adagrad", dict(initial_accumulator_value=-1)),
    ("NAdam", dict(momentum_decay=-1)), ("RMSprop", dict(momentum=-1)), ("RMSprop", dict(alpha=-1)),
    ("Rprop", dict(etas=(0.5, 0.9))), ("Rprop", dict(etas=(0.0, 1.2))),
]


@pytest.mark.parametrize(("name", "kwargs"), MORE_ERRORS, ids=str)
def test_more_errors_of_torch(name: str, kwargs: dict[str, Any]) -> None:
    raised = []
    for optimizer in (OURS[name], INFOS[name].optim_cls):
        with pytest.raises(Exception) as error:  # noqa: PT011
            optimizer([Parameter(torch.ones(2))], **kwargs)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


@pytest.mark.parametrize("kwargs", [dict(lr=-1.0), dict(lr=torch.tensor([0.1, 0.2])), dict(weight_decay=-1),
                                    dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1))], ids=str)
def test_lion_raises_as_adamw_does(kwargs: dict[str, Any]) -> None:
    raised = []
    for optimizer in (Lion, torch.optim.AdamW):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            optimizer([Parameter(torch.ones(2))], **kwargs)
        raised.append(str(error.value))
    assert raised[0] == raised[1]


def test_signatures_are_torchs() -> None:
    import inspect

    for name, ours in OURS.items():
        theirs = inspect.signature(INFOS[name].optim_cls.__init__).parameters
        mine = inspect.signature(ours.__init__).parameters
        for key, parameter in theirs.items():
            assert mine[key].default == parameter.default, f"{name}({key})"
            assert mine[key].kind == parameter.kind, f"{name}({key})"
        assert [k for k, v in theirs.items() if v.kind == v.POSITIONAL_OR_KEYWORD] == \
               [k for k, v in mine.items() if v.kind == v.POSITIONAL_OR_KEYWORD]
        assert set(mine) - set(theirs) == {"options"}
        assert issubclass(ours, INFOS[name].optim_cls)


def test_the_witness_can_see() -> None:
    """A step of another equation must not pass for the same."""
    wrong = run(Case("Adam L2", torch.float64, layouts=("matrix",)), "reference")["matrix p"]
    right = run(Case("Adam decoupled", torch.float64, layouts=("matrix",)), "reference")["matrix p"]
    with pytest.raises(AssertionError):
        close(wrong, right, 1e-12, "")
