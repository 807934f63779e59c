"""Storage options of parameter groups, end to end: what is kept, what a step does with it, and what comes back."""

from __future__ import annotations

import copy
import io
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fasttrain import LossScaler
from fasttrain.optim import ASGD, SGD, AdamW, Lion, NAdam, clip_grad_norm, convert
from fasttrain.precision.codecs import STOCHASTIC
from fasttrain.precision.storage import PRESETS
from tests.helpers import assert_same_bits, generator

BACKENDS = ("cpu", "reference")
ADAMW_BYTES = {  # per element of a bf16 parameter: its memory, gradient and states included, and the traffic of a step
    "mixed": (16, 28), "split": (14, 26), "10-byte": (10, 18), "8-byte": (8.03, 14.06), "7-byte": (7.03, 12.06),
    "6-byte": (6.03, 10.06), "5-byte": (5.06, 8.13),
}


def parameters(dtype: torch.dtype = torch.bfloat16, sizes: tuple[Any, ...] = ((90, 64), (5,))) -> list[Parameter]:
    numbers = generator(3)
    return [Parameter(torch.randn(size, generator=numbers).bfloat16().to(dtype)) for size in sizes]


def give_gradients(params: list[Parameter], step: int, scale: float = 1.0) -> None:
    numbers = generator(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=numbers).bfloat16() * scale).to(p.dtype)


def run(params: list[Parameter], optimizer: Any, steps: int, first: int = 0) -> list[Tensor]:
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def states(optimizer: Any, params: list[Parameter]) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in optimizer.state[p].items()} for p in params]


def same(a: Any, b: Any, what: str) -> None:
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            for key in x:
                assert x[key].dtype == y[key].dtype, f"{what}: {key}"
                assert torch.equal(x[key].reshape(-1).view(torch.uint8), y[key].reshape(-1).view(torch.uint8)), \
                    f"{what}: {key} of parameter {i}"
        else:
            assert_same_bits(x, y, f"{what}: parameter {i}")


# --- What is kept -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_those_of_the_table(name: str) -> None:
    params = parameters(sizes=((512, 512),))
    optimizer = AdamW(params, storage=name)
    run(params, optimizer, 1)
    count = params[0].numel()
    kept = sum(value.nbytes for key, value in optimizer.state[params[0]].items() if key != "step")
    memory, traffic = ADAMW_BYTES[name]
    assert (kept + params[0].nbytes + params[0].grad.nbytes) / count == pytest.approx(memory, abs=0.005)
    moved = optimizer.last_step.bytes_read + optimizer.last_step.bytes_written
    assert moved / count == pytest.approx(traffic, abs=0.007)


def test_defaults_are_torchs_to_the_byte() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        ours, theirs = parameters(dtype), parameters(dtype)
        a, b = AdamW(ours), torch.optim.AdamW(theirs)
        run(ours, a, 2)
        run(theirs, b, 2)
        for p, q in zip(ours, theirs, strict=True):
            assert {k: (v.dtype, v.shape) for k, v in a.state[p].items()} == \
                   {k: (v.dtype, v.shape) for k, v in b.state[q].items()}
        assert a.state_dict()["param_groups"][0].keys() == b.state_dict()["param_groups"][0].keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("master", ["fp32", "split"])
def test_an_exact_master_is_an_fp32_run(master: str, backend: str) -> None:
    """The bf16 parameter is the fp32 parameter, rounded, at every step; nothing is lost."""
    params, exact = parameters(), parameters(torch.float32)
    optimizer, plain = AdamW(params, lr=1e-2, master=master, backend=backend), AdamW(exact, lr=1e-2, backend=backend)
    for step in range(40):
        give_gradients(params, step)
        for p, q in zip(params, exact, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
    for p, q in zip(params, exact, strict=True):
        state = optimizer.state[p]
        if master == "fp32":
            assert_same_bits(state["master"], q.detach(), "master")
            assert_same_bits(p.detach(), q.detach().bfloat16(), "parameter")
        else:
            bits = (p.detach().view(torch.int16).int() << 16) + state["remainder"].int()
            assert_same_bits(bits.view(torch.float32), q.detach(), "both halves")
        assert_same_bits(state["exp_avg_sq"], plain.state[q]["exp_avg_sq"], "second moment")


def test_small_steps_are_not_lost() -> None:
    """At lr 1e-5 a bf16 weight of 1 never moves; every option that keeps its digits moves it like fp32."""
    moved = {}
    for name, options in {"none": {}, "split": {"master": "split"}, "split8": {"master": "split8"},
                          "kahan": {"master": "kahan"}, "stochastic": {"master": "stochastic"}}.items():
        p = Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=1e-5, weight_decay=0.0, **options)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[name] = 1 - p.detach().double().mean().item()
    assert moved["none"] == 0.0
    for name in ("split", "split8", "kahan"):  # 100 steps of 1e-5, within half a unit in bf16's last place below 1
        assert abs(moved[name] - 1e-3) <= 2.0**-9, name
    assert moved["stochastic"] == pytest.approx(1e-3, rel=0.3)  # five standard errors of 4,096 weights


@pytest.mark.parametrize("of", [AdamW, NAdam])
def test_second_moments_in_bf16_decay(of: Any) -> None:
    """After a drop of the gradients; rounded to nearest they would stay where they were."""
    p = Parameter(torch.zeros(4096))
    optimizer = of([p], lr=0.0, betas=(0.9, 0.999), state_dtype="bf16")
    for step in range(3000):
        p.grad = torch.full_like(p, 1.0 if step < 1000 else 0.1)
        optimizer.step()
    kept = optimizer.state[p]["exp_avg_sq"]
    assert kept.dtype == torch.bfloat16
    truth = (1 - 0.999**1000) * 0.999**2000 + 0.01 * (1 - 0.999**2000)
    assert kept.double().mean().item() == pytest.approx(truth, rel=0.02)


def test_what_is_rounded_at_random() -> None:
    """What retains nearly everything in fewer bits than it would have; of running numbers the betas know nothing."""
    def rounded(of: Any, dtype: torch.dtype, **options: Any) -> list[bool]:
        optimizer = of([Parameter(torch.zeros(4096, dtype=dtype))], **options)
        codecs = optimizer._layout("p", optimizer._param((0, 0)), dtype, optimizer.param_groups[0], of.rules[0]).codecs
        return [bool(number & STOCHASTIC) for number in codecs[2:]]

    for of in (AdamW, NAdam):
        assert rounded(of, torch.float32, state_dtype="bf16") == [False, True]
        assert rounded(of, torch.float32, state_dtype="bf16", betas=(0.999, 0.99)) == [True, False]
        assert rounded(of, torch.bfloat16, state_dtype="bf16") == [False, False]  # as torch keeps them
        assert rounded(of, torch.bfloat16, storage="10-byte") == [False, True]
        assert rounded(of, torch.bfloat16, storage="8-byte") == [False, True]
        assert rounded(of, torch.float32, state_dtype="bf16", state_rounding="nearest") == [False, False]
    assert rounded(ASGD, torch.float32, state_dtype="bf16") == [False]  # a weight: fp32

    class Averaging(NAdam):  # what the second state retains depends on a running number
        rules = (replace(NAdam.rules[0], retain={"exp_avg": "b1", "exp_avg_sq": "now"}),)

    assert rounded(Averaging, torch.float32, state_dtype="bf16") == [False, True]


def test_what_stays_fp32() -> None:
    small, large = Parameter(torch.zeros(100)), Parameter(torch.zeros(5000))
    embedding = Parameter(torch.zeros(100, 80))
    optimizer = AdamW([{"params": [small, large]}, {"params": [embedding], "state_dtype": None}], state_dtype="int8")
    for p in (small, large, embedding):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert optimizer.state[large]["exp_avg"].dtype == torch.int8
    assert optimizer.state[large]["exp_avg_sq"].dtype == torch.uint8
    assert optimizer.state[embedding]["exp_avg"].dtype == torch.float32
    mixed = AdamW([large], state_dtype={"exp_avg": torch.bfloat16})
    mixed.step()
    assert {k: v.dtype for k, v in mixed.state[large].items() if k != "step"} == {
        "exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}


# --- Outside of the step ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("master", ["fp32", "split", "kahan"])
def test_weights_written_outside_are_followed(master: str, backend: str) -> None:
    params = parameters()
    optimizer = SGD(params, lr=0.0, master=master, backend=backend)
    run(params, optimizer, 2)
    with torch.no_grad():
        for p in params:
            p.clamp_(-0.5, 0.5)
    wanted = [p.detach().clone() for p in params]
    same(run(params, optimizer, 2), wanted, "clamped weights")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_master_keeps_the_digits_of_elements_that_were_not_written(backend: str) -> None:
    p = parameters(sizes=((64,),))[0]
    optimizer = SGD([p], lr=1e-4, master="fp32", backend=backend)
    run([p], optimizer, 3)
    before = optimizer.state[p]["master"].clone()
    with torch.no_grad():
        p[0] = 7.0
    optimizer.param_groups[0]["lr"] = 0.0
    run([p], optimizer, 1)
    assert optimizer.state[p]["master"][0] == 7.0
    assert_same_bits(optimizer.state[p]["master"][1:], before[1:], "the others")


def test_every_write_is_seen_by_autograd() -> None:
    p = parameters(sizes=((4096,),))[0]
    optimizer = AdamW([p], storage="8-byte", ema_decay=0.9, zero_gradients=True)
    run([p], optimizer, 1)
    versions = {key: value._version for key, value in {**optimizer.state[p], "p": p}.items()}
    p.grad = torch.ones_like(p)
    grad = p.grad
    optimizer.step()
    for key, value in {**optimizer.state[p], "p": p}.items():
        assert value._version > versions[key], key
    assert grad._version > 0
    assert not grad.any()


# --- EMA --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ema_is_the_average_of_the_weights(dtype: torch.dtype, backend: str) -> None:
    params = parameters(dtype)
    options = {"master": "split"} if dtype == torch.bfloat16 else {}
    optimizer = AdamW(params, lr=1e-2, ema_decay=0.9, backend=backend, **options)
    averages = [p.detach().double().clone() for p in params]
    for step in range(20):
        if step == 10:
            params[1].requires_grad_(False)
        give_gradients(params, step)
        if step >= 10:
            params[1].grad = None  # a resting parameter: its average approaches it
        optimizer.step()
        for i, p in enumerate(params):
            now = p.detach().double()
            if options and p.grad is not None:
                bits = (p.detach().view(torch.int16).int() << 16) + optimizer.state[p]["remainder"].int()
                now = bits.view(torch.float32).double()
            averages[i] = 0.9 * averages[i] + 0.1 * now
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6  # 20 steps of three fp32 roundings each
    for p, average in zip(params, averages, strict=True):
        assert torch.allclose(optimizer.state[p]["ema"].double(), average, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "decay", "unit"), [("bf16", 0.999, 2.0**-8), ("fp16", 0.9999, 2.0**-11)])
def test_the_ema_of_a_resting_parameter_is_rounded_at_random(dtype: str, decay: float, unit: float) -> None:
    """Rounded to nearest, an average would not move: below 1 it goes by less than half of a unit."""
    ends = []
    for seed in (1, 1, 2):
        params = [Parameter(torch.ones(4096)), Parameter(torch.ones(1))]
        optimizer = SGD(params, lr=0.0, ema_decay=decay, ema_dtype=dtype, seed=seed)
        give_gradients(params, 0)
        optimizer.step()
        params[0].data.zero_()
        params[0].grad = None
        averages = [optimizer.state[params[0]]["ema"].clone()]
        for step in range(1, 201):
            give_gradients(params[1:], step)
            optimizer.step()
            averages.append(optimizer.state[params[0]]["ema"].clone())
        ends.append(averages)
    assert optimizer.param_groups[0]["draws"] == 201
    one, again, other = ends
    for average, the_same in zip(one, again, strict=True):
        assert_same_bits(average, the_same)
    assert not torch.equal(one[-1], other[-1])
    assert one[0].eq(1).all()
    # The error of 200 draws is at most sqrt(200) / 2 units, that of a mean of 4,096 elements 1/64 of it.
    assert one[-1].double().mean().item() == pytest.approx(decay**200, abs=5 * 200**0.5 * unit / 2 / 64)
    moved = [(after != before).double().mean().item() for before, after in itertools.pairwise(one)]
    assert all(0.0 < share < 1.0 for share in moved)


def test_an_ema_moves_once_where_parameters_are_stepped_on_arrival() -> None:
    arriving, usual = (AdamW(parameters(), lr=1e-2, ema_decay=0.9, ema_dtype="bf16", master="split") for _ in range(2))
    arriving.step_on_arrival()
    for step in range(4):
        for optimizer in (arriving, usual):
            params = optimizer.param_groups[0]["params"]
            numbers = generator(step)
            loss = sum((p * torch.randn(p.shape, generator=numbers)).sum() for p in params[step == 2:])
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    same(*(states(optimizer, optimizer.param_groups[0]["params"]) for optimizer in (arriving, usual)), "on arrival")


def test_ema_weights_are_swapped_in_and_out() -> None:
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, ema_decay=0.5, master="split")
    run(params, optimizer, 3)
    own, kept = [p.detach().clone() for p in params], states(optimizer, params)
    with optimizer.ema_weights():
        for p in params:
            assert_same_bits(p.detach(), optimizer.state[p]["ema"].bfloat16(), "inside")
        with pytest.raises(RuntimeError, match="ema_weights"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="inside another"), optimizer.ema_weights():
            pass
    same([p.detach() for p in params], own, "after")
    twin = copy.deepcopy(optimizer)
    run(params, optimizer, 1, first=3)
    twins = [p for group in twin.param_groups for p in group["params"]]
    run(twins, twin, 1, first=3)
    same([p.detach() for p in params], [p.detach() for p in twins], "a step after the swap")
    assert kept[0]["remainder"].any()
    with pytest.raises(RuntimeError, match="no parameter group has an ema_decay"), AdamW(params).ema_weights():
        pass


# --- Norms, scales, zeros ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", [{}, {"storage": "8-byte"}])
def test_clipping_by_the_norm_enters_the_step(storage: dict[str, Any], backend: str) -> None:
    params, twins = parameters(), parameters()
    a, b = AdamW(params, lr=1e-2, backend=backend, **storage), AdamW(twins, lr=1e-2, backend=backend, **storage)
    for step in range(4):
        give_gradients(params, step, scale=0.001 if step == 2 else 1.0)
        give_gradients(twins, step, scale=0.001 if step == 2 else 1.0)
        before = [p.grad.clone() for p in params]
        norm = a.clip_grad_norm_(1.0)
        truth = torch.stack([g.double().square().sum() for g in before]).sum().sqrt()
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(truth.item(), rel=1e-6)
        a.step()
        same([p.grad for p in params], before, "gradients are not rewritten")
        b._clip = min(1.0, 1.0 / (norm.item() + 1e-6))  # the coefficient, injected
        b.step()
    same([p.detach() for p in params], [p.detach() for p in twins], "clipped steps")
    give_gradients(params, 9)
    a.step()  # the coefficient held for one step
    give_gradients(twins, 9)
    b.step()
    same([p.detach() for p in params], [p.detach() for p in twins], "the step after")


def test_one_norm_of_several_optimizers() -> None:
    params = parameters(torch.float32)
    for p in params:
        p.grad = torch.ones_like(p)
    pair = [SGD(params[:1], lr=1.0), SGD(params[1:], lr=1.0)]
    norm = clip_grad_norm(pair, 0.5)
    assert norm.item() == pytest.approx(math.sqrt(sum(p.numel() for p in params)), rel=1e-6)
    before = [p.detach().clone() for p in params]
    for optimizer in pair:
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.allclose(q - p, torch.full_like(p, 0.5 / norm.item()), rtol=1e-4)  # of a difference
    params[0].grad[0] = math.inf
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        clip_grad_norm(pair, 1.0, error_if_nonfinite=True)
    assert pair[0]._clip == 1.0
    with pytest.raises(ValueError, match="must not be negative"):
        clip_grad_norm(pair, -1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_by_value_and_of_each_parameter(backend: str) -> None:
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=1.0, clip_value=0.25, backend=backend)
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q - p.grad.clamp(-0.25, 0.25), "by value")
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=1.0, clip_each=3.0, backend=backend)
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        coefficient = min(1.0, 3.0 / (p.grad.double().norm().item() + 1e-6))
        assert torch.allclose(p.detach(), q - coefficient * p.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", [{}, {"storage": "6-byte", "ema_decay": 0.9}])
def test_a_skipped_step_changes_nothing(storage: dict[str, Any], backend: str) -> None:
    params = parameters()
    optimizer, scaler = AdamW(params, backend=backend, **storage), LossScaler(2.0**10, growth_interval=2)
    scales = []
    for step in range(6):
        give_gradients(params, step, scale=scaler.get_scale())
        before, kept = [p.detach().clone() for p in params], states(optimizer, params)
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        if step == 3:
            params[1].grad[2] = math.inf
        norm = scaler.step(optimizer, max_norm=1.0)
        scales.append(scaler.get_scale())
        assert optimizer.last_step.skipped == (step == 3)
        if step == 3:
            same([p.detach() for p in params], before, "parameters")
            same(states(optimizer, params), kept, "states")
            assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        else:
            assert norm.item() == pytest.approx(math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
                                                / (2.0**10 if step < 2 else 2.0**11 if step < 4 else 2.0**10), rel=1e-3)
    assert scales == [2.0**10, 2.0**11, 2.0**11, 2.0**10, 2.0**10, 2.0**11]


def test_the_scaler_comes_back() -> None:
    scaler = LossScaler(8.0, growth_interval=5)
    scaler.update(torch.tensor(True))
    scaler.update(torch.tensor(False))
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert (other.get_scale(), other._growth.item(), other.growth_interval) == (4.0, 1, 5)
    with pytest.raises(ValueError, match="has no scale"):
        other.load_state_dict({})
    with pytest.raises(ValueError, match="must be positive"):
        LossScaler(0.0)
    fixed = LossScaler(4.0, dynamic=False)
    fixed.update(torch.tensor(True))
    assert fixed.get_scale() == 4.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_left_zeroed(backend: str) -> None:
    params, twins = parameters(), parameters()
    a, b = Lion(params, zero_gradients=True, backend=backend), Lion(twins, backend=backend)
    for step in range(3):
        for p, q in zip(params, twins, strict=True):
            fresh = torch.full_like(p, step - 1.0)
            p.grad = fresh.clone() if p.grad is None else p.grad.add_(fresh)  # accumulated into what is left
            q.grad = fresh
        a.step()
        b.step()
        assert not any(p.grad.any() for p in params)
    same([p.detach() for p in params], [p.detach() for p in twins], "steps")


@pytest.mark.parametrize("backend", BACKENDS)
def test_stepping_on_arrival_is_stepping(backend: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    twin = copy.deepcopy(model)
    a, b = AdamW(model.parameters(), backend=backend), AdamW(twin.parameters(), backend=backend)
    arrival = a.step_on_arrival(accumulation=2)
    for step in range(4):
        for half in range(2):
            x = torch.randn(4, 8, generator=generator(2 * step + half))
            model(x).square().mean().backward()
            twin(x).square().mean().backward()
            assert all((p.grad is None) == (half == 1) for p in model.parameters())
        a.step()
        b.step()
        b.zero_grad()
    same([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()], "weights")
    with pytest.raises(RuntimeError, match="as their gradients arrive"):
        a.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="before anything can divide by a loss scale"):
        LossScaler().step(a)
    with pytest.raises(RuntimeError, match="already"):
        a.step_on_arrival()
    arrival.remove()
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="at least 1"):
        a.step_on_arrival(0)


# --- State that goes out and comes back -------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [*({"storage": name} for name in PRESETS), {"master": "kahan", "ema_decay": 0.9},
                                     {"master": "split", "state_dtype": "e5m2", "ema_decay": 0.5, "ema_dtype": "bf16"}],
                         ids=str)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "torch.save"])  # torch cannot pickle 8-bit floats otherwise
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(options: dict[str, Any], how: str) -> None:
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, **options)
    run(params, optimizer, 3)
    if how == "state_dict":
        twins = parameters()
        twin = AdamW(twins, lr=1.0, **options)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with torch.no_grad():  # in either order: here the weights come after the optimizer's state
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
    else:
        torch.save(optimizer, file := io.BytesIO())
        file.seek(0)
        twin = copy.deepcopy(optimizer) if how == "deepcopy" else torch.load(file, weights_only=False)
        twins = [p for group in twin.param_groups for p in group["params"]]
    same(run(params, optimizer, 3, first=3), run(twins, twin, 3, first=3), "weights")
    same(states(optimizer, params), states(twin, twins), "states")


@pytest.mark.parametrize("source", [{}, {"storage": "8-byte"}, {"storage": "5-byte"}, {"master": "kahan"}], ids=str)
@pytest.mark.parametrize("target", [None, {}, {"storage": "split"}, {"storage": "mixed", "ema_decay": 0.9}], ids=str)
def test_conversion(source: dict[str, Any], target: dict[str, Any] | None) -> None:
    params = parameters()
    old = AdamW(params, lr=1e-2, **source)
    run(params, old, 5)
    state = old.state_dict()
    before = copy.deepcopy(state)
    new = torch.optim.AdamW(params) if target is None else AdamW(params, **target)
    new.load_state_dict(convert(state, new))
    for index, p in enumerate(params):
        assert new.state[p]["step"].item() == 5
        decoded = convert(state, torch.optim.AdamW(params))["state"][index]
        for key in ("exp_avg", "exp_avg_sq"):
            kept = new.state[p][key]
            assert torch.equal(kept.float(), decoded[key].to(kept.dtype).float()), key
    run(params, new, 1, first=5)
    assert new.param_groups[0]["lr"] == 1e-2
    same([state["state"][0]], [before["state"][0]], "the source is as it was")


def test_a_master_survives_conversion() -> None:
    params = parameters()
    split = AdamW(params, lr=1e-3, storage="split")
    run(params, split, 5)
    mixed = AdamW(params, storage="mixed")
    mixed.load_state_dict(convert(split.state_dict(), mixed))
    back = AdamW(params, storage="split")
    back.load_state_dict(convert(mixed.state_dict(), back))
    same(states(back, params), states(split, params), "there and back")


@pytest.mark.parametrize("master", ["none", "fp32", "split", "kahan"])
@pytest.mark.parametrize("stepped", [False, True])
def test_weights_go_in_and_out_in_full_precision(master: str, stepped: bool) -> None:
    params = parameters()
    optimizer = SGD(params, lr=0.0, momentum=0.9, master=master)
    if stepped:
        run(params, optimizer, 1)
    weights = [torch.randn(p.shape, generator=generator(7)) for p in params]
    optimizer.load_full_precision(weights)
    run(params, optimizer, 2)
    for got, wanted, p in zip(optimizer.full_precision(), weights, params, strict=True):
        if master in ("fp32", "split"):
            assert_same_bits(got, wanted, master)
        else:
            assert torch.allclose(got, wanted, rtol=2.0**-8 if master == "none" else 2.0**-16)
        assert torch.allclose(p.detach().float(), wanted, rtol=2.0**-8)
    with pytest.raises(ValueError, match="1 weights are given for 2"):
        optimizer.load_full_precision(weights[:1])
    with pytest.raises(ValueError, match=r"the weight has shape \(3,\)"):
        optimizer.load_full_precision([weights[0], torch.zeros(3)])


# --- Bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (dict(master="fp64"), "master='fp64' is none of"),
    (dict(state_dtype="int3"), "state_dtype='int3' is none of"),
    (dict(state_dtype={"exp_avg": "fp7"}), r"state_dtype\['exp_avg'\]='fp7' is none of"),
    (dict(state_rounding="up"), "state_rounding='up' is none of"),
    (dict(ema_decay=1.0), r"ema_decay=1.0 must be in \[0, 1\)"),
    (dict(ema_dtype="int8"), "ema_dtype='int8' is none of"),
    (dict(min_size=-1), "min_size=-1 must be an integer"),
    (dict(clip_value=0.0), "clip_value=0.0 must be positive"),
    (dict(clip_each=-1.0), "clip_each=-1.0 must be positive"),
    (dict(storage="3-byte"), "storage '3-byte' is none of"),
])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **options)
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype, options, message", [
    (torch.float32, dict(master="fp32"), "is torch.float32; master='fp32' is for bfloat16 and float16 parameters"),
    (torch.float64, dict(master="stochastic"), "is torch.float64; master='stochastic'"),
    (torch.float16, dict(master="split"), "is torch.float16; master='split' is for bfloat16 parameters: use"),
    (torch.float64, dict(state_dtype="int8"), "is torch.float64, whose states are float64"),
    (torch.complex64, dict(ema_decay=0.9), "takes real floating-point parameters"),
    (torch.bfloat16, dict(state_dtype={"momentum": "int8"}), "the states are exp_avg, exp_avg_sq"),
])
def test_what_a_dtype_cannot_take(dtype: torch.dtype, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        AdamW([("blocks.0.weight", Parameter(torch.zeros(5000, dtype=dtype)))], **options)
    assert "blocks.0.weight" in str(error.value)


def test_state_dicts_that_do_not_fit() -> None:
    params = parameters()
    optimizer = AdamW(params, storage="8-byte")
    run(params, optimizer, 2)
    before, kept = [p.detach().clone() for p in params], states(optimizer, params)
    fitting = optimizer.state_dict()

    def changed(change: Any) -> dict[str, Any]:
        state = copy.deepcopy(fitting)
        change(state)
        return state

    others = {
        "kept with the defaults": AdamW(params).state_dict() | {"state": {0: {"step": torch.tensor(1.0)}}},
        "has no 'exp_avg_scale'": changed(lambda s: s["state"][0].pop("exp_avg_scale")),
        "has 'momentum_buffer' for it": changed(lambda s: s["state"][0].update(momentum_buffer=torch.zeros(90, 64))),
        r"its state 'exp_avg' has shape \(3,\)": changed(lambda s: s["state"][0].update(exp_avg=torch.zeros(3))),
        "different number of parameter groups": changed(lambda s: s["param_groups"].append(s["param_groups"][0])),
    }
    for message, state in others.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        same([p.detach() for p in params], before, message)
        same(states(optimizer, params), kept, message)
    with pytest.raises(ValueError, match="groups of 2 parameters, the optimizer of 1"):
        convert(fitting, AdamW(params[:1]))
    optimizer.load_state_dict(fitting)


def test_states_put_in_by_hand_are_checked() -> None:
    params = parameters()
    optimizer = AdamW(params, storage="8-byte")
    run(params, optimizer, 1)
    kept = optimizer.state[params[0]]["exp_avg"]
    optimizer.state[params[0]]["exp_avg"] = kept.float()
    before = [p.detach().clone() for p in params]
    give_gradients(params, 1)
    with pytest.raises(RuntimeError, match=r"'exp_avg' is torch.float32 of shape .*fasttrain.optim.convert"):
        optimizer.step()
    same([p.detach() for p in params], before, "weights")
    optimizer.state[params[0]]["exp_avg"] = kept
    optimizer.step()


# --- Counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("storage", [{}, {"storage": "8-byte"}, {"storage": "5-byte", "ema_decay": 0.9}])
def test_a_step_is_one_launch_and_allocates_once(storage: dict[str, Any]) -> None:
    params = parameters(sizes=((70, 70), (5,), (100, 100), (8192,)))
    optimizer = AdamW(params, **storage)
    for step in range(3):
        give_gradients(params, step)
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        assert optimizer.last_step.launches == 1
        assert optimizer.last_step.parameters == len(params)
        assert (optimizer.last_step.allocations > 0) == (step == 0)
        assert optimizer.last_step.host_syncs == 0
