"""Offloaded steps against the plain optimizer on the CPU, bit for bit, over copies that are late, early or mixed.

A wait that is missing shows as wrong numbers: late copies have not been made when somebody reads, early ones overwrite
what somebody has yet to read.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from fake_link import FakeLink
from helpers import CPU, assert_same_bits, generator
from stored import same
from torch.nn import Parameter

import fasttrain.optim
from fasttrain import LossScaler
from fasttrain.optim import SGD, AdamW, Optimizer, twin

SIZES = ((90, 64), (5,), (70, 80), (3, 4, 5), (2, 6, 5, 5), ())
BUCKET = 12_000  # bytes: the large ones go alone
PACES = ("late", "early", "mixed")
F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "AdamW": ("AdamW", F32, {}),
    "split, int8, EMA": ("AdamW", BF16, dict(storage="8-byte", ema_decay=0.9)),
    "stochastic, int4": ("AdamW", BF16, dict(storage="5-byte", ema_decay=0.9, ema_dtype="bf16")),
    "zeroed gradients": ("AdamW", BF16, dict(storage="mixed", zero_gradients=True, clip_each=0.5)),
    "float32 gradients": ("Lion", BF16, dict(master="kahan")),
    "float16": ("Adam", torch.float16, dict(master="fp32", amsgrad=True)),
    "momentum": ("SGD", F32, dict(momentum=0.9, nesterov=True)),
    "no state": ("SGD", BF16, dict(master="stochastic")),
    "complex": ("SGD", torch.complex64, dict(momentum=0.9)),
    "running numbers": ("NAdam", F32, {}),
    "states from the start": ("Adagrad", F32, {}),
    "numbers of the group": ("ScheduleFreeAdamW", F32, dict(warmup_steps=3)),
    "two stages": ("LAMB", F32, {}),
    "Adafactor": ("Adafactor", F32, {}),
}


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeLink:
    return linked(monkeypatch, getattr(request, "param", "late"))


def linked(monkeypatch: pytest.MonkeyPatch, pace: str = "late") -> FakeLink:
    """All memory is a GPU's."""
    made = FakeLink(pace)
    monkeypatch.setattr(twin, "link_of", lambda device: made)
    return made


def parameters(dtype: torch.dtype = F32) -> list[Parameter]:
    numbers = generator(5)
    params = [Parameter(torch.randn(size, dtype=torch.float64, generator=numbers).to(dtype)) for size in SIZES]
    params[4] = Parameter(params[4].detach().to(memory_format=torch.channels_last))
    return params


def both(kind: str, dtype: torch.dtype = F32, device: torch.device = CPU,
         **options: object) -> tuple[Optimizer, Optimizer]:
    """An offloaded optimizer and a plain one on the CPU, each of its own parameters of two groups."""
    made = []
    for offload, where in ((dict(offload=True, offload_bucket=BUCKET), device), ({}, CPU)):
        named = [(f"p{i}", Parameter(p.detach().to(where))) for i, p in enumerate(parameters(dtype))]
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.03}]
        made.append(getattr(fasttrain.optim, kind)(groups, lr=0.1, **options, **offload))
    return made[0], made[1]


def params_of(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give(optimizer: Optimizer, step: int, dtype: torch.dtype | None = None) -> None:
    """Gradients of two backward passes; some are missing, one is in another order than its parameter."""
    numbers = generator(step)
    for i, p in enumerate(params_of(optimizer)):
        first, second = (torch.randn(p.shape, dtype=torch.float64, generator=numbers).to(p.device, dtype or p.dtype)
                         for _ in range(2))
        if dtype is not None:
            p.grad_dtype = dtype
        if i == 2 and step == 3:
            first, second = first.t().contiguous().t(), second.t().contiguous().t()
        rests = (i + step) % 5 == 3 or (i == 0 and not p.requires_grad)
        p.grad = None if rests else first
        if p.grad is not None:
            p.grad += second


def assert_same(got: Optimizer, wanted: Optimizer) -> None:
    same([p.detach() for p in params_of(got)], [p.detach() for p in params_of(wanted)], "parameters")
    a, b = got.state_dict(), wanted.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for number, state in b["state"].items():
        assert a["state"][number].keys() == state.keys()
        for key, value in state.items():
            assert a["state"][number][key].stride() == value.stride(), key
            assert_same_bits(a["state"][number][key], value, f"{key} of {number}")


def run(optimizer: Optimizer, first: int, last: int, dtype: torch.dtype | None = None) -> list[int]:
    """Steps with a schedule, clipping, a step that is skipped, a parameter that thaws; how many steps were made."""
    scaler, made = LossScaler(4.0, dynamic=False), []
    params = params_of(optimizer)
    for step in range(first, last):
        params[0].requires_grad_(step >= 2)
        give(optimizer, step, dtype)
        if step == 2:
            optimizer.clip_grad_norm_(0.5)
        if step == 3:
            params[1].grad = torch.full_like(params[1].grad if params[1].grad is not None else params[1], torch.inf)
        if step in (3, 4):
            scaler.step(optimizer, max_norm=10.0)
        else:
            optimizer.step()
        optimizer.param_groups[1]["lr"] = 0.03 / (1 + step)
        made.append(optimizer.last_step.parameters)
    return made


@pytest.mark.parametrize(("case", "link"), [(case, PACES[i % 3]) for i, case in enumerate(CASES)], indirect=["link"])
def test_bits(link: FakeLink, case: str) -> None:
    ours = compare(case, CPU)
    assert link.most == {"down": 1, "up": 1}
    assert ours.last_step.host_syncs >= 2  # buckets


def compare(case: str, device: torch.device) -> Optimizer:
    """Six steps of a case, with parameters on a device, against the same on the host."""
    kind, dtype, options = CASES[case]
    ours, plain = both(kind, dtype, device, **options)
    grad = F32 if case == "float32 gradients" else None
    counts = run(ours, 0, 6, grad)
    assert counts == run(plain, 0, 6, grad)
    assert counts[3] == 0  # skipped
    assert_same(ours, plain)
    if options.get("zero_gradients"):
        same([p.grad for p in params_of(ours) if p.grad is not None],
             [p.grad for p in params_of(plain) if p.grad is not None], "gradients")
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("link", PACES, indirect=True)
def test_bits_at_every_pace(link: FakeLink, case: str) -> None:
    test_bits(link, case)


@pytest.mark.parametrize("link", PACES, indirect=True)
def test_stepping_on_arrival(link: FakeLink) -> None:
    """In backward, in the order in which gradients come; two are under way when it ends."""
    def model() -> torch.nn.Sequential:
        torch.manual_seed(0)
        sizes = [(60, 60)] * 5
        return torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes)).to(BF16)

    ours, plain = model(), model()
    options = dict(lr=0.1, storage="8-byte", ema_decay=0.9)
    a = AdamW(ours.parameters(), **options, offload=True, offload_bucket=BUCKET)
    b = AdamW(plain.parameters(), **options)
    a.step_on_arrival(accumulation=2)
    for step in range(4):
        for half in range(2):
            x = torch.randn(4, 60, generator=generator(2 * step + half)).to(BF16)
            for one in (ours, plain):
                one[1].requires_grad_(step != 1)
                one(x).float().square().mean().backward()
        assert all(p.grad is None for p in ours.parameters())
        a.step()
        b.step()
        b.zero_grad()
        assert_same(a, b)
    assert link.most == {"down": 1, "up": 1}
    assert link.calls["down"] > 4 * 2
    assert link.moved["down"] > 4 * link.moved["up"] / 5


def test_arriving_twice_in_a_step(link: FakeLink) -> None:
    """A parameter is not stepped while it is on its way up from its last one."""
    made = []
    for offload in (dict(offload=True, offload_bucket=64), {}):
        params = [Parameter(torch.ones(20)), Parameter(torch.ones(30))]
        optimizer = SGD(params, lr=0.1, momentum=0.9, **offload)
        optimizer.step_on_arrival()
        for turn in range(4):
            params[1].mul(2.0 + turn).sum().backward()
            params[1].mul(3.0 + turn).sum().backward()
            params[0].sum().backward()
        optimizer.step()
        made.append(optimizer)
    assert_same(*made)


def test_no_gradient_is_kept_alive(link: FakeLink) -> None:
    link.pace = "early"
    ours, _ = both("AdamW")
    for step in range(2):
        give(ours, step)
        ours.step()
    held = [weakref.ref(p.grad) for p in params_of(ours) if p.grad is not None]
    ours.zero_grad()
    assert [grad() for grad in held] == [None] * len(held)
    host = weakref.ref(ours._host)
    del ours
    gc.collect()
    assert host() is None


def test_pinned_memory_is_what_was_said(link: FakeLink) -> None:
    for options in ({}, dict(storage="8-byte", ema_decay=0.9), dict(storage="5-byte")):
        ours, _ = both("AdamW", BF16, **options)
        needs, before = ours.pinned_bytes(), link.pinned_bytes
        assert link.pinned_bytes == before
        for step in range(3):
            give(ours, step)
            ours.step()
        assert link.pinned_bytes - before == needs.total
        assert needs.slots == 2
        assert needs.gradients == 2 * BUCKET
        held = {tensor.data_ptr() for homes in ours._host.homes.values() for tensor in homes.values()}
        kept = [value for p in params_of(ours) for key, value in ours.state[p].items() if key != "step"]
        assert {value.data_ptr() for value in kept} == held  # every state lies there, and nothing else
        assert needs.states >= sum(value.nbytes for value in kept) > needs.states - 64 * len(kept)


@pytest.mark.parametrize(("options", "what"), [({}, "for gradients"), (dict(offload_bucket=1), "for copies of param"),
                                               (dict(storage="mixed"), "for states")])
def test_pinned_memory_is_refused(link: FakeLink, options: dict[str, object], what: str) -> None:
    params = parameters(BF16)
    before = [p.detach().clone() for p in params]
    ours = AdamW(params, **options, offload=True)
    needs = ours.pinned_bytes()
    link.room = {"for gradients": 0, "for copies of param": needs.gradients,
                 "for states": needs.gradients + needs.parameters}[what]
    give(ours, 0)
    with pytest.raises(RuntimeError, match=f"(?s)pinned memory {what}.*no parameter was stepped: .*ulimit -l"):
        ours.step()
    same([p.detach() for p in params], before, "parameters")
    assert not ours.state
    link.room = needs.total
    ours.step()
    assert ours.last_step.parameters == sum(p.grad is not None for p in params)


def test_larger_gradients_than_foreseen(link: FakeLink) -> None:
    """Of another dtype than their parameters: the slots grow."""
    params = parameters(BF16)
    ours = AdamW(params, offload=True, offload_bucket=BUCKET)
    give(ours, 0, torch.float64)
    ours.step()
    plain = AdamW(parameters(BF16))
    give(plain, 0, torch.float64)
    plain.step()
    same([p.detach() for p in params], [p.detach() for p in params_of(plain)], "parameters")


# --- Parameters that change outside -----------------------------------------------------------------------------------

@pytest.mark.parametrize("link", PACES, indirect=True)
@pytest.mark.parametrize("master", ["none", "split", "fp32"])
def test_parameters_written_outside(link: FakeLink, master: str) -> None:
    ours, plain = both("AdamW", BF16, master=master, ema_decay=0.9)
    for optimizer in (ours, plain):
        for step in range(5):
            give(optimizer, step)
            optimizer.step()
            for i, p in enumerate(params_of(optimizer)):
                if (i + step) % 2:
                    with torch.no_grad():
                        p.mul_(0.5)
    assert_same(ours, plain)


def test_new_memory_and_new_groups(link: FakeLink) -> None:
    """`p.data` is another tensor; a group is added; a state is dropped."""
    ours, plain = both("AdamW")
    for optimizer in (ours, plain):
        run(optimizer, 0, 2)
        params = params_of(optimizer)
        params[2].data = params[2].data * 2
        optimizer.add_param_group({"params": [("late", Parameter(torch.ones(9)))]})
        del optimizer.state[params[4]]
        run(optimizer, 2, 5)
    assert_same(ours, plain)


# --- What is refused --------------------------------------------------------------------------------------------------

def test_nothing_is_written_where_something_cannot_be_stepped(link: FakeLink) -> None:
    ours, plain = both("AdamW")
    run(ours, 0, 2)
    run(plain, 0, 2)
    last = params_of(ours)[4]
    kept = ours.state[last]["exp_avg"]
    for what, error, match in (("state", RuntimeError, "no tensor 'exp_avg'"), ("sparse", TypeError, "takes dense")):
        give(ours, 5)
        assert last.grad is not None
        if what == "state":
            ours.state[last]["exp_avg"] = None
        else:
            last.grad = torch.zeros(SIZES[4]).to_sparse()
        with pytest.raises(error, match=match):
            ours.step()
        ours.state[last]["exp_avg"] = kept
        assert_same(ours, plain)
    run(ours, 2, 4)
    run(plain, 2, 4)
    assert_same(ours, plain)


def test_options_that_do_not_go_together(link: FakeLink) -> None:
    p = Parameter(torch.ones(3))
    for options, match in ((dict(differentiable=True), "autograd cannot follow"), (dict(backend="triton"), "leave it")):
        p.grad = torch.ones(3)
        with pytest.raises(TypeError, match=match):
            AdamW([p], offload=True, **options).step()
        assert p.detach().tolist() == [1.0] * 3
    with pytest.raises(TypeError, match="offload='cpu' must be True or False"):
        SGD([p], lr=0.1, offload="cpu")
    with pytest.raises(ValueError, match="offload_bucket=0"):
        SGD([p], lr=0.1, offload=True, offload_bucket=0)


def test_a_model_on_the_host_is_stepped_where_it_is() -> None:
    """The same script runs without a GPU; nothing is copied, nothing pinned."""
    ours, plain = both("AdamW")
    run(ours, 0, 5)
    run(plain, 0, 5)
    assert_same(ours, plain)
    assert ours._host is None
    with pytest.raises(TypeError, match="a parameter on meta"):
        SGD([Parameter(torch.ones(1, device="meta"))], lr=0.1, offload=True).step()


def test_some_parameters_on_the_host(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = [None, link] * 3
    monkeypatch.setattr("fasttrain.optim.offload.links", lambda params: ways)
    monkeypatch.setattr("fasttrain.optim.offload.same", lambda *_: True)
    made = [parameters(), parameters()]
    ours, plain = AdamW(made[0], lr=0.1, offload=True), AdamW(made[1], lr=0.1)
    for optimizer in (ours, plain):
        for step in range(3):
            give(optimizer, step)
            optimizer.step()
    assert_same(ours, plain)
    assert link.calls["up"] == 3
