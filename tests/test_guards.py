"""Guards that look at validation, at parameters and at gradients; and what guards cost the host in a step."""

import copy
import gc
import json
import math
import sys

import pytest
import ranks
import torch
from torch import nn

from fasttrain import guards
from fasttrain import optim as ours
from fasttrain import schedules as s

# --- Validation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, sign", [("min", 1.0), ("max", -1.0)])
def test_early_stopping(mode, sign):
    stopping = guards.EarlyStopping(patience=2, min_delta=0.1, mode=mode)
    metrics = [5.0, 4.0, 3.95, math.nan, 3.8, 3.8, 3.75, 3.71]
    told = [stopping.update(sign * metric, 10 * i) for i, metric in enumerate(metrics)]
    assert [one.better for one in told] == [True, True, False, False, True, False, False, False]
    assert [one.patience_left for one in told] == [2, 2, 1, 0, 2, 1, 0, 0]
    assert [one.stop for one in told] == [False] * 7 + [True]
    assert told[-1][3:5] == (sign * 3.8, 40)
    assert told[-1].reason == f"no better than {sign * 3.8} of step 40 for 3 evaluations"


def test_early_stopping_for_other_reasons():
    assert guards.EarlyStopping(9, goal=1.0).update(0.9, 3).reason == "0.9 of step 3 reaches the goal of 1.0"
    assert guards.EarlyStopping(9, goal=0.9, mode="max").update(0.8, 3).reason is None
    assert guards.EarlyStopping(9, nonfinite="stop").update(math.nan, 3).reason == "the metric of step 3 is nan"
    assert guards.EarlyStopping(0).update(math.inf, 3).reason == "no finite metric for 1 evaluations"


@pytest.mark.parametrize("make", [
    lambda: guards.EarlyStopping(3), lambda: guards.Best("max"), lambda: guards.Gap(2),
    lambda: guards.NoiseScale(2, 8), lambda: s.Plateau(patience=1)])
def test_states_go_through_json_and_go_on_the_same(make):
    def call(guard, i):
        values = [(i * 7919 % 13) / 5, (i * 104729 % 11) / 3 + 1]
        kind = type(guard)
        if kind is s.Plateau:
            return guard.update(values[0])
        return guard.update(*values) if kind in (guards.Gap, guards.NoiseScale) else guard.update(values[0], i)

    straight, half = make(), make()
    wanted = [call(straight, i) for i in range(20)]
    for i in range(9):
        call(half, i)
    other = make()
    other.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert [call(other, i) for i in range(9, 20)] == wanted[9:]
    with pytest.raises(ValueError, match="the state has no"):
        other.load_state_dict({})
    assert [other.state_dict()] == [straight.state_dict()]


@pytest.mark.parametrize("make, message", [
    (lambda: guards.EarlyStopping(-1), "patience=-1"), (lambda: guards.EarlyStopping(1, mode="low"), "mode='low'"),
    (lambda: guards.EarlyStopping(1, min_delta=math.nan), "min_delta=nan"),
    (lambda: guards.EarlyStopping(1, nonfinite="ignore"), "nonfinite='ignore'"),
    (lambda: guards.Gap(0), "patience=0"), (lambda: guards.NoiseScale(8, 8), "small=8 and big=8"),
    (lambda: guards.NoiseScale(1, 8, decay=1.0), "decay=1.0"), (lambda: guards.Later(-1), "delay=-1"),
    (lambda: guards.UpdateRatios([], 1), "there are 0"),
    (lambda: guards.Best("max").load_state_dict(guards.Best("min").state_dict()), "mode='min', and this one has 'max'"),
    (lambda: guards.decay_groups(nn.Tanh()), "no parameter of this Tanh needs a gradient")])
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gap():
    gap = guards.Gap(patience=2)
    told = [gap.update(*pair) for pair in ((2.0, 2.1), (1.9, 2.2), (1.8, 2.1), (1.7, 2.2), (math.nan, 2.3), (1.6, 2.3))]
    assert [one.growing for one in told] == [0, 1, 0, 1, 1, 2]
    assert [one.overfitting for one in told] == [False] * 5 + [True]
    assert math.isnan(told[4].gap)


# --- Parameters -------------------------------------------------------------------------------------------------------

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm([2, 4])  # gains of two dimensions
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("options, decaying", [
    ({}, {"embedding.weight", "linear.weight"}),
    ({"embeddings": False}, {"linear.weight"}),
    ({"biases": True}, {"embedding.weight", "linear.weight", "linear.bias", "scale"}),
    ({"norms": True}, {"embedding.weight", "linear.weight", "norm.weight", "norm.bias"}),
    ({"decays": lambda name, p: {"scale": True, "linear.weight": False}.get(name)}, {"scale", "embedding.weight"}),
    ({"decays": lambda name, p: True}, {"embedding.weight", "linear.weight", "linear.bias", "scale", "norm.weight",
                                        "norm.bias"})])
def test_decay_groups(options, decaying):
    model = Tied()
    groups = guards.decay_groups(model, 0.3, lr=0.5, **options)
    names = [{name for name, _ in group["params"]} for group in groups]
    assert names[0] == decaying
    assert set().union(*names) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0][:len(groups)]
    for kind in (ours.AdamW, torch.optim.AdamW):
        optimizer = kind(groups, lr=1e-3, weight_decay=0.1)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5][:len(groups)]
    assert "weight_decay" not in guards.decay_groups(model)[0]


# --- Gradients and updates --------------------------------------------------------------------------------------------

def test_the_noise_scale_of_known_noise():
    """Gradients of samples are G + noise of covariance 0.25 in 400 dimensions: S = 100, |G|^2 = 4; so 25."""
    generator = torch.Generator().manual_seed(1)
    true = torch.full((400,), 0.1, dtype=torch.float64)
    noise = guards.NoiseScale(small=4, big=32, decay=0.99)
    for _ in range(400):
        samples = true + 0.5 * torch.randn(32, 400, generator=generator, dtype=torch.float64)
        parts = samples.view(8, 4, 400).mean(1)
        small = torch.stack([guards.square_norm([part]) for part in parts]).mean()
        decision = noise.update(small.item(), guards.square_norm([None, parts.mean(0)]).item())
    assert decision.signal == pytest.approx(4.0, rel=0.1)  # 4 standard errors of so many steps
    assert decision.noise == pytest.approx(100.0, rel=0.02)
    assert decision.noise_scale == pytest.approx(25.0, rel=0.12)
    before = noise.now()
    assert noise.update(math.inf, 1.0) == before
    assert math.isnan(guards.NoiseScale(1, 2).now().noise_scale)
    assert math.isnan(guards.NoiseScale(1, 2, 0.0).update(3.0, 1.0).noise_scale), "no signal"


def squares_of_a_rank(wire):
    from fasttrain.parallel import DataParallel

    torch.manual_seed(0)
    model = DataParallel(nn.Linear(8, 4), mesh=wire, broadcast_buffers=False)
    x = torch.full((2, 8), 1.0 + wire.rank)
    squares = guards.GradientSquares(model)
    with squares.measure():
        model(x).square().mean().backward()
    own = torch.autograd.grad(model.module(x).square().mean(), list(model.module.parameters()))
    big = guards.square_norm(p.grad for p in model.parameters())
    return squares.take().item(), guards.square_norm(own).item(), big.item(), model.reducer.statistics()[0].item()


def test_squares_of_one_rank_before_they_are_averaged():
    results = ranks.run(squares_of_a_rank, 2)
    assert results[0][0] < 0.5 * results[1][0]
    for small, own, big, reduced in results:
        assert small == pytest.approx(own, rel=1e-5)
        assert big == pytest.approx(reduced, rel=1e-5)
        assert big != pytest.approx(small, rel=0.1)
    assert results[0][2] == results[1][2]
    with pytest.raises(RuntimeError, match="no backward pass was measured"):
        guards.GradientSquares(nn.Linear(1, 1)).take()


def test_update_ratios_are_measured_when_they_are_due():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer, ratios = ours.AdamW(model.parameters(), lr=0.01), guards.UpdateRatios(model, every=3)
    told = []
    for step in range(8):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with ratios.measure(step):
            optimizer.step()
        if step % 3 == 0:
            wanted = {name: ((p.detach() - before[name]).norm() / before[name].norm()).item()
                      for name, p in model.named_parameters()}
        told.append(ratios.update(step))
        if told[-1] is not None:
            assert told[-1].of == pytest.approx(wanted, rel=1e-6)
    assert [one and one.step for one in told] == [None, 0, None, None, 3, None, None, 6]
    assert told[1].highest == max(told[1].of, key=told[1].of.get)
    assert ratios.flush() == []


# --- Averages ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fails", [False, True])
def test_averaged_weights_and_the_exact_ones_back(fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1)).bfloat16()
    model[1].eval()
    optimizer = ours.AdamW(model.parameters(), lr=0.1, ema_decay=0.5, master="split")
    for _ in range(3):
        model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]

    def evaluate():
        with guards.ema(optimizer, model=model) as averaged:
            assert averaged
            assert not any(module.training for module in model.modules())
            for p in model.parameters():
                assert torch.equal(p, optimizer.state[p]["ema"].bfloat16())
            if fails:
                raise KeyError("in evaluation")

    if fails:
        with pytest.raises(KeyError):
            evaluate()
    else:
        evaluate()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


def test_a_failure_half_way_into_the_averages(monkeypatch):
    from fasttrain.optim import ema

    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = ours.SGD(params, lr=1.0, ema_decay=0.5)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    exchange, calls = ema._exchange, []

    def out_of_memory(p, average):
        calls.append(p)
        if len(calls) == 3:
            raise MemoryError
        return exchange(p, average)

    monkeypatch.setattr(ema, "_exchange", out_of_memory)
    with pytest.raises(MemoryError), guards.ema(optimizer):
        pytest.fail("the block must not run")
    assert all(torch.equal(p, torch.zeros(2)) for p in params)
    monkeypatch.undo()
    with guards.ema(optimizer):
        assert torch.equal(params[0], torch.full((2,), 0.5))


def test_without_an_average():
    plain = ours.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    with pytest.raises(RuntimeError, match="SGD: there is no average of the weights"), guards.ema(plain):
        pass
    with guards.ema(plain, torch.optim.SGD([nn.Parameter(torch.ones(1))]), required=False) as averaged:
        assert not averaged


def averaged_under_zero(wire):
    from fasttrain.parallel import DataParallel, Zero

    torch.manual_seed(0)
    model = DataParallel(nn.Linear(8, 4), mesh=wire, broadcast_buffers=False)
    optimizer = Zero(model, ours.AdamW, stage=2, lr=0.1, ema_decay=0.5)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    inside = []

    def fail():
        with guards.ema(optimizer, model=model):
            inside.extend(p.detach().clone() for p in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    return inside, all(torch.equal(p, q) and not torch.equal(p, i)
                       for p, q, i in zip(model.parameters(), before, inside, strict=True))


def test_averages_under_zero_are_the_same_on_every_rank():
    (one, exact), (other, too) = ranks.run(averaged_under_zero, 2)
    assert exact
    assert too
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


# --- What a step costs ------------------------------------------------------------------------------------------------

def test_calls_of_a_step():
    """Schedule, late reading, both guards of losses: so many calls of Python and C, and no more; none waits."""
    optimizer = ours.AdamW([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))]}])
    scheduler = s.Scheduler(optimizer, lr=s.warmup_cosine(1000, 10), weight_decay=s.linear(1000))
    guard, spikes = guards.NonFinite(), guards.LossSpikes()
    found, loss, norm = torch.tensor(False), torch.tensor(2.0), torch.tensor(1.0)

    def step(number):
        judged = guard.watch(number, found=found, loss=loss, norm=norm, batch=number)
        if judged is not None and judged.kind == "good":
            spikes.update(judged.step, judged.loss + 1e-3 * (number * 7 % 11))
        scheduler.step()

    for number in range(200):
        step(number)
    counts = []

    def count(frame, event, argument):
        counts.append(event in ("call", "c_call"))

    gc.disable()
    sys.setprofile(count)
    try:
        step(200)
    finally:
        sys.setprofile(None)
        gc.enable()
    assert 30 < sum(counts) <= 140, sum(counts)
