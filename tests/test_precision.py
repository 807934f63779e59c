"""`Precision`: every mode trains on the CPU, fp16 skips and backs off, and combinations that would lose are refused."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from fasttrain import Precision, guards
from fasttrain import optim as ours
from fasttrain.precision.mixed import MODES
from fasttrain.precision.storage import describe

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16),
                         nn.Linear(16, 1))


def batches(count: int = 200) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(32, 8, generator=generator) for _ in range(count)]
    return [(x, (x[:, :1] * x[:, 1:2]).sigmoid()) for x in made]


def train(precision, model, optimizer, data, overflow=(), scaler=None):
    """As docs/precision.md has it."""
    losses = []
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        with precision.autocast():
            out = model(precision.input(x))
        loss = (out.float() - y).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if step in overflow:
            p = next(p for p in model.parameters() if p.grad is not None)
            p.grad[0, 0] = math.inf
        if scaler is None:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        else:
            scaler.step(optimizer, max_norm=1.0)
        losses.append(loss.item())
    return losses


@functools.cache
def reference():
    model = model_of()
    return train(Precision(), model, ours.AdamW(guards.decay_groups(model), lr=0.01), batches())


@pytest.mark.parametrize("name, keep", [*((name, ()) for name in MODES), ("bf16-pure", "4.*"), ("fp16-pure", "4.*")])
def test_every_mode_learns(name, keep):
    precision = Precision(name, keep=keep)
    model = precision.cast(model_of())
    optimizer = ours.AdamW(precision.groups(guards.decay_groups(model)), lr=0.01)
    precision.check(model, optimizer)
    scaler = precision.scaler(init_scale=2.0**12) if "fp16" in name else precision.scaler()
    assert (scaler is not None) == ("fp16" in name)
    losses = train(precision, model, optimizer, batches(), scaler=scaler)
    wanted = reference()
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    assert sum(losses[-20:]) == pytest.approx(sum(wanted[-20:]), rel=0.1)  # what 8 bits of a mantissa change by then
    for name, p in model.named_parameters():
        short = precision.pure and not name.startswith("1.") and not (keep and name.startswith("4."))
        assert p.dtype == (precision.dtype if short else torch.float32)


@pytest.mark.parametrize("name", ["fp16", "fp16-pure"])
def test_fp16_on_the_cpu_skips_backs_off_and_goes_on(name):
    precision = Precision(name)
    model = precision.cast(model_of())
    optimizer = ours.AdamW(precision.groups(model.named_parameters()), lr=0.01)
    scaler = precision.scaler(init_scale=2.0**10, growth_interval=1000)
    train(precision, model, optimizer, batches(3), scaler=scaler)
    before = copy.deepcopy(list(model.parameters()))
    train(precision, model, optimizer, batches(1), overflow=(0,), scaler=scaler)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**9
    train(precision, model, optimizer, batches(1), scaler=scaler)
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert all(state["step"] == 4 for state in optimizer.state.values())


def test_fp16_finds_its_scale_from_above():
    """The first scale overflows in the model's own gradients, nothing is planted."""
    precision = Precision("fp16")
    model = model_of()
    optimizer, scaler = ours.SGD(model.parameters(), lr=0.05), precision.scaler(init_scale=2.0**30)
    losses = train(precision, model, optimizer, batches(100), scaler=scaler)
    assert 1.0 < scaler.get_scale() < 2.0**30
    assert losses[-1] < 0.7 * losses[0]


def test_small_updates_are_not_lost_in_pure_bf16():
    """A step of 2^-12 at 1.0 is below the last bit of bf16; the split master keeps it exactly."""
    weight = nn.Module()
    weight.p = nn.Parameter(torch.ones(64))
    precision = Precision("bf16-pure")
    precision.cast(weight)
    optimizer = ours.SGD(precision.groups(weight.parameters()), lr=2.0**-12)
    for _ in range(64):
        weight.p.grad = torch.ones(64, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(weight.p.float(), torch.full((64,), 1 - 2.0**-6))


def test_groups_are_divided_by_what_was_cast():
    precision = Precision("bf16-pure")
    model = precision.cast(model_of())
    groups = precision.groups([{"params": list(model[0].named_parameters()), "lr": 0.5},
                               {"params": list(model[1:].named_parameters())}])
    optimizer = ours.AdamW(groups)
    assert [(len(group["params"]), group["lr"], describe(group)) for group in optimizer.param_groups] == [
        (2, 0.5, "master='split'"), (6, 1e-3, "master='split'"), (2, 1e-3, "the defaults")]
    assert Precision("bf16").groups(model_of().parameters())[0].keys() == {"params"}


def test_what_is_kept_is_told():
    model = model_of()
    for name in ("fp32", "bf16", "fp16"):
        assert "0 of 497 parameters" in Precision(name).describe(model)
    assert "a loss scale.\nKept in fp32: all parameters, gradients and states of the optimizer, and what autocast" \
        in Precision("fp16").describe(model)
    precision = Precision("bf16-pure", keep="4.weight")
    precision.cast(model)
    assert precision.kept(model) == {"parameters": ["1.weight", "1.bias", "4.weight"],
                                     "buffers": ["1.running_mean", "1.running_var"]}
    assert "449 of 497 parameters are bfloat16" in precision.describe(model)
    assert "4.weight" in precision.describe(model)



@pytest.mark.parametrize("name, make, options, error, message", [
    ("bf16", "bf16-pure", {}, ValueError, "'bf16' has fp32 parameters, and 0.weight, 0.bias, .* are not"),
    ("fp32", "fp16-pure", {}, ValueError, "'fp32' has fp32 parameters"),
    ("bf16-pure", "fp16-pure", {}, ValueError, "has bfloat16 parameters, and 0.weight.* are not: call cast"),
    ("bf16-pure", "fp32", {}, ValueError, "none of this model is one: call cast"),
    ("bf16-pure", "bf16-pure", {"plain": True}, ValueError, "no masters of bfloat16 parameters: give it master"),
    ("bf16-pure", "bf16-pure", {"stock": True}, TypeError, r"torch\.optim\.adamw\.AdamW, which keeps no masters"),
    ("fp16", "fp32", {"stock": True}, TypeError, "has none for fasttrain.LossScaler"),
    ("fp16", "fp32", {"arrival": True}, ValueError, "step_on_arrival"),
])
def test_combinations_that_would_lose_are_refused(name, make, options, error, message):
    precision = Precision(name)
    model = Precision(make).cast(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    params = list(model.parameters())
    kind = torch.optim.AdamW if "stock" in options else ours.AdamW
    optimizer = kind(params if "plain" in options or "stock" in options else precision.groups(params))
    if "arrival" in options:
        optimizer.step_on_arrival()
    with pytest.raises(error, match=message):
        precision.check(model, optimizer)


@pytest.mark.parametrize("arguments, message", [
    (dict(name="bf8"), "precision 'bf8' is none of 'fp32', 'bf16'"),
    (dict(name="bf16", keep=["head"]), "its parameters are all fp32")])
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Precision(**arguments)
    with pytest.raises(ValueError, match=r"'tail' names no parameter or buffer; there are 0\.weight"):
        Precision("bf16-pure", keep=["tail"]).cast(model_of())


def test_a_gpu_that_cannot(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ValueError, match="this GPU does not compute in bfloat16; use 'fp16'"):
        Precision("bf16", "cuda")
    assert repr(Precision("fp16", "cuda")) == "Precision('fp16', 'cuda')"


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODES)
def test_on_a_gpu(name):
    precision = Precision(name, "cuda")
    model = precision.cast(model_of()).cuda()
    optimizer = ours.AdamW(precision.groups(guards.decay_groups(model)), lr=0.01)
    precision.check(model, optimizer)
    data = [(x.cuda(), y.cuda()) for x, y in batches()]
    losses = train(precision, model, optimizer, data, scaler=precision.scaler())
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
