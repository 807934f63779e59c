"""Steps on a GPU, by host and by device: compared in one call, and only what moved is sent; counts, and every bit."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from few import OPTIMIZERS, assert_same, give, parameters, snapshot
from helpers import needs_native
from test_cuda_driver import fake as fake
from test_cuda_driver import library as library
from test_plan import CHANGES, Change
from torch.nn import Parameter

from benchmarks import stubbed
from fasttrain.kernels import cuda
from fasttrain.optim import Adam, AdamW, Lion, Optimizer, afar, drive, driven_step
from fasttrain.optim.roster import Roster

pytestmark = needs_native
KINDS = {"host": False, "device": True}


@pytest.fixture
def on_gpu(fake: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    return fake


@pytest.fixture
def naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing is compiled."""
    monkeypatch.setattr(afar, "compiled", Roster)
    for module in (drive, driven_step):
        monkeypatch.setattr(module, "roster", lambda groups: Roster(groups, None))


def followed(change: Change, make: Any, **options: Any) -> dict[str, torch.Tensor]:
    params = parameters()
    opt = make(params, **options)
    for step in range(3):
        give(params, step)
        opt.step()
    give(params, 3)
    change(opt, params)
    opt.step()
    opt.step()  # the same pointers once more
    give(params, 20)
    opt.step()
    return snapshot(params, opt)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_tables_follow(change: Change, optimizer: str, on_gpu: Any) -> None:
    """Against the reference, which keeps nothing."""
    make = OPTIMIZERS[optimizer]
    assert_same(followed(change, make, backend="cuda"), followed(change, make, backend="reference"))


@pytest.mark.parametrize("change", CHANGES)
def test_tables_of_the_device_follow(change: Change, on_gpu: Any) -> None:
    """The same of steps that the device drives, by either roster."""
    make, options = OPTIMIZERS["AdamW"], dict(backend="cuda", capturable=True)
    wanted = followed(change, make, backend="reference", capturable=True)
    assert_same(followed(change, make, **options), wanted)


@pytest.mark.usefixtures("naive")
@pytest.mark.parametrize("change", CHANGES[::3])
@pytest.mark.parametrize("driven", KINDS)
def test_without_the_compiled_roster(change: Change, driven: str, on_gpu: Any) -> None:
    make, options = OPTIMIZERS["AdamW"], dict(capturable=KINDS[driven])
    wanted = followed(change, make, backend="reference", **options)
    assert_same(followed(change, make, backend="cuda", **options), wanted)


@pytest.mark.parametrize("options", [
    dict(master="split", clip_value=0.02), dict(storage="8-byte", min_size=1, zero_gradients=True),
    dict(storage="5-byte", min_size=1, seed=5, ema_decay=0.9, ema_dtype="bf16"),
    dict(master="stochastic", state_dtype="bf16", maximize=True)], ids=lambda options: " ".join(map(str, options)))
def test_storages(options: dict[str, Any]) -> None:
    """Rows with keys, second arrays, zeroed gradients, and a parameter that somebody wrote between two steps."""
    pytest.importorskip("triton", reason="triton is not installed")
    ends = []
    for backend in ("triton", "reference"):
        params = parameters(torch.bfloat16, ((700,), (5,), (33,)))
        opt = AdamW(params, lr=0.1, backend=backend, **options)
        for step in range(5):
            give(params, step)
            if step == 3:
                with torch.no_grad():
                    params[0].mul_(0.5)
                params[2].grad = None
            versions = [p.grad._version for p in params[:2]]
            opt.step()
            zeroed = bool(options.get("zero_gradients"))
            assert [p.grad._version - old for p, old in zip(params[:2], versions, strict=True)] == [zeroed] * 2
            assert not zeroed or not any(p.grad.any() for p in params[:2])
        ends.append(snapshot(params, opt))
        assert opt.last_step.parameters == 3
        if backend == "triton":
            assert opt._afar is not None
    assert_same(*ends)


def test_parameters_that_share_memory_are_stepped_in_turn(on_gpu: Any) -> None:
    ends = []
    for backend in ("cuda", "reference"):
        base = torch.ones(12)
        params = [Parameter(base[:8]), Parameter(base[4:])]
        opt = Lion(params, lr=0.1, backend=backend)
        for step in range(4):
            give(params, step)
            if step == 1:
                params[1].grad = None
            opt.step()
        ends.append({**snapshot(params, opt), "base": base})
    assert_same(*ends)


def test_experts_come_and_go(on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all are known nothing is examined, whichever have gradients; tables of the same set are used again."""
    params = parameters(sizes=((40,),) * 6)
    opt = Lion(params, lr=0.1, backend="cuda")
    sets = [(0, 1, 2), (3, 4, 5), (0, 5)]
    for turn in range(9):
        give(params, turn)
        for index, p in enumerate(params):
            if index not in sets[turn % 3]:
                p.grad = None
        opt.step()
        assert opt.last_step.parameters == len(sets[turn % 3])
        if turn == 2:
            monkeypatch.setattr(type(opt), "_examine", lambda *_: pytest.fail("it was examined again"))
            assert len(opt._afar.stood) == 2, "the first set was made before others were told"
        if turn >= 5:
            assert len(opt._afar.stood) == 3
        if turn >= 6:
            assert opt.last_step.bytes_sent <= 8 * len(sets[turn % 3]), "addresses, where they are others by now"


@pytest.mark.parametrize("driven", KINDS)
def test_a_step_that_failed_leaves_nothing_behind(driven: str, on_gpu: Any) -> None:
    """The first parameter was moved and told before the second was refused; the next step takes it where it is."""
    params, wanted = parameters(), parameters()
    opt = AdamW(params, lr=0.1, backend="cuda", capturable=KINDS[driven])
    peer = AdamW(wanted, lr=0.1, backend="reference", capturable=KINDS[driven])
    for step in range(2):
        for own, one in ((params, opt), (wanted, peer)):
            give(own, step)
            one.step()
    for own in (params, wanted):
        own[0].data = own[0].detach().clone()
    old = params[0].detach()
    params[1].grad = None
    params[1].grad_dtype = None
    params[1].grad = torch.ones(8, dtype=torch.complex64)
    before = snapshot(params, opt)
    with pytest.raises(TypeError):
        opt.step()
    assert_same(snapshot(params, opt), before)
    params[0].data = params[0].detach().clone()  # where it was, nobody may write
    params[1].grad = None
    for own, one in ((params, opt), (wanted, peer)):
        give(own, 5)
        one.step()
    assert_same(snapshot(params, opt), snapshot(wanted, peer))
    assert_same({"old": old}, {"old": before["0 p"]})


def counted(step: Any) -> int:
    """Calls of Python functions, and of compiled ones by Python, in a step."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("driven", KINDS)
@pytest.mark.parametrize("options", [{}, dict(master="split", state_dtype="int8", min_size=1)], ids=["plain", "split"])
def test_calls_do_not_grow_with_the_parameters(driven: str, options: dict[str, Any]) -> None:
    """With new gradients: less than one call for two parameters, of which autograd is told 16 at a time."""
    found, sent = [], []
    with stubbed.device() as code:
        for count in (64, 512):
            params = [Parameter(torch.randn(64, dtype=torch.bfloat16 if options else torch.float32))
                      for _ in range(count)]
            opt = AdamW(params, backend="cuda", capturable=KINDS[driven], **options)
            for _ in range(3):
                kept = [p.grad for p in params]
                for p in params:
                    p.grad = torch.ones_like(p)
                launched = code.launched
                found.append(counted(opt.step))
                assert code.launched - launched == opt.last_step.launches
            sent.append(opt.last_step.bytes_sent)
            del kept
    assert (found[5] - found[2]) / (512 - 64) < 0.6, found
    if not options:  # int8 states are rounded at random, with a key for each parameter
        assert sent[1] - sent[0] == 8 * (512 - 64), "one address each"


@pytest.mark.parametrize("driven", KINDS)
def test_one_address_is_sent_where_one_gradient_moved(driven: str) -> None:
    with stubbed.device():
        params = [Parameter(torch.randn(64)) for _ in range(20)]
        opt: Optimizer = Lion(params, backend="cuda", capturable=KINDS[driven])
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            opt.step()
        assert (opt.last_step.copies, opt.last_step.bytes_sent) == (0, 0)
        old, params[7].grad = params[7].grad, torch.ones(64)
        opt.step()
        assert (opt.last_step.copies, opt.last_step.bytes_sent) == (1, 8)
        older, params[9].grad = params[9].grad, torch.ones(64)
        params[7].grad = old
        opt.step()
        assert (opt.last_step.copies, opt.last_step.bytes_sent) == (1, 24), "from the first that moved to the last"
        del older


@pytest.mark.parametrize("driven", KINDS)
def test_a_step_that_is_vouched_for_compares_nothing(driven: str, on_gpu: Any) -> None:
    """Only where the step before was vouched for alike; and what a state dict replaced is noticed."""
    params, wanted = parameters(), parameters()
    opt = Adam(params, lr=0.1, backend="cuda", capturable=KINDS[driven])
    peer = Adam(wanted, lr=0.1, backend="reference", capturable=KINDS[driven])
    for own in (params, wanted):
        give(own)

    def roster() -> Any:
        return opt._drive.roster if KINDS[driven] else opt._afar.roster

    scans = []
    for step, token in enumerate(["a", "a", "a", "b", None, "b", "b", "b"]):
        for own in (params, wanted):
            for p, new in zip(own, parameters(seed=step), strict=True):
                p.grad.copy_(new.detach())
        known = roster() if step else None
        if known is not None and not isinstance(known, Counting):
            known = Counting(known)
            if KINDS[driven]:
                opt._drive.roster = known
            else:
                opt._afar.roster = known
        before = known.scans if known is not None else 0
        opt.vouched = token
        opt.step()
        assert opt.vouched is None
        peer.step()
        scans.append(0 if known is None else known.scans - before)
        assert_same(snapshot(params, opt), snapshot(wanted, peer))
        if step == 6:
            opt.load_state_dict(opt.state_dict())
            peer.load_state_dict(peer.state_dict())
            break
    assert scans == [0, 0, 0, 1, 1, 1, 0]
    opt.vouched = "b"
    opt.step()
    peer.step()
    assert_same(snapshot(params, opt), snapshot(wanted, peer))


class Counting:
    """A roster that counts its scans."""

    def __init__(self, roster: Any) -> None:
        self.roster, self.scans = roster, 0

    def scan(self, *arguments: Any) -> Any:
        self.scans += 1
        return self.roster.scan(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.roster, name)
