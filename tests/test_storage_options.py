"""Storage options of parameter groups, end to end: what is kept, and what a step does with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from stored import give_gradients, parameters, run, same
from torch.nn import Parameter

from fasttrain.optim import ASGD, SGD, AdamW, Lion, NAdam
from fasttrain.precision.codecs import STOCHASTIC
from fasttrain.precision.storage import PRESETS

ADAMW_BYTES = {  # per element of a bf16 parameter: its memory, gradient and states included, and the traffic of a step
    "mixed": (16, 28), "split": (14, 26), "10-byte": (10, 18), "8-byte": (8.03, 14.06), "7-byte": (7.03, 12.06),
    "6-byte": (6.03, 10.06), "5-byte": (5.06, 8.13),
}


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
