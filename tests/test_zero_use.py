"""ZeRO in a script: norms, loss scales, schedules, accumulation, averages, and what it refuses."""

import math
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ranks
import torch
from helpers import assert_same_bits
from sharded import assert_same_model, backward, loss_of, model_of, pair
from torch import nn

from fasttrain import LossScaler
from fasttrain.optim import AdamW, Lion, Muon, ScheduleFreeAdamW
from fasttrain.parallel import DataParallel, Reducer, Zero
from fasttrain.parallel.zero_gather import Gathering

F32, BF16 = torch.float32, torch.bfloat16
ADAMW = {"lr": 0.1}


def in_a_script(wire, stage):
    """Schedules, clipping, a loss scale; a step that is not finite on one rank is skipped on all."""
    model, zero, twin, whole = pair(wire, AdamW, F32, stage, ADAMW, rotating=1)
    scaler, beside = LossScaler(1024.0, growth_interval=2), LossScaler(1024.0, growth_interval=2)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in (zero, whole)]
    for step in range(5):
        norms = []
        for wrapped, optimizer, scale in ((model, zero, scaler), (twin, whole, beside)):
            loss = loss_of(wrapped, step, wire.rank)
            if step == 2 and wire.rank == 1:
                loss = loss * math.nan
            scale.scale(loss).backward()
            norms.append(scale.step(optimizer, max_norm=1e9).item())  # no reduction of one order decides any bit
            optimizer.zero_grad()
        assert norms[0] == pytest.approx(norms[1], rel=1e-6, nan_ok=True)
        for schedule in schedules:
            schedule.step()
        assert zero.inner.last_step.skipped == (step == 2)
        assert scaler.get_scale() == beside.get_scale()
        assert_same_model(model, twin, f"step {step}")
    backward(model, 5, wire.rank)
    backward(twin, 5, wire.rank)
    norm = nn.utils.clip_grad_norm_(twin.module.parameters(), 1e-3)
    torch.testing.assert_close(zero.clip_grad_norm_(1e-3), norm, rtol=1e-6, atol=0)
    assert zero._clip == pytest.approx(1e-3 / norm.item(), rel=1e-4)
    amp = torch.amp.GradScaler("cpu", init_scale=2.0)
    amp.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="LossScaler"):
        amp.step(zero)
    return scaler.get_scale(), zero.param_groups[0]["lr"]


def test_norm_loss_scale_and_schedule():
    for stage in (1, 2):
        assert set(ranks.run(in_a_script, 2, stage)) == {(2048.0, 0.025)}


def accumulated(wire, stage):
    """Synchronised passes of one step add up; what is not wanted is forgotten."""
    model, zero, twin, whole = pair(wire, AdamW, F32, stage, ADAMW)
    for step in range(2):
        loss_of(model, 7, wire.rank).backward()  # not wanted
        (zero if step else model).zero_grad()
        backward(model, step, wire.rank, 3, synchronised=True)
        backward(twin, step, wire.rank, 3)
        square, bad = zero.grad_statistics()
        torch.testing.assert_close(square, twin.reducer.statistics()[0], rtol=1e-5, atol=0)
        assert not bad
        zero.step()
        whole.step()
        whole.zero_grad()
    for p, q in zip(model.module.parameters(), twin.module.parameters(), strict=True):
        # Where a gradient is all rounding its sign may differ, and with it a step of Adam.
        assert ((p - q).abs() > 1e-3).sum() <= 0.02 * p.numel() + 1
    return True


def test_synchronised_passes_add_up():
    assert all(ranks.run(accumulated, 2, 1))
    assert all(ranks.run(accumulated, 2, 2))


def mixed(wire, stage):
    """Gradients of bf16 and fp32 parameters in fp32 buckets, a group for each, overlapped gathers, writes outside."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        bare = nn.Sequential(nn.Linear(40, 33).bfloat16(), nn.LayerNorm(33).bfloat16(), Cast(), nn.Linear(33, 40))
        made.append(DataParallel(bare, mesh=wire, wire="ordered", grad_dtype=F32, bucket_cap_mb=0.005))
    model, twin = made
    groups = [
        [{"params": [(name, p) for name, p in bare.module.named_parameters() if (p.dtype == BF16) == small],
          **({"master": "split", "lr": 0.05} if small else {})} for small in (True, False)] for bare in made]
    zero, whole = Zero(groups[0], AdamW, stage=stage, lr=0.1), AdamW(groups[1], lr=0.1)
    for step in range(4):
        for wrapped, optimizer in ((model, zero), (twin, whole)):
            for micro in range(2):
                x = torch.randn(3, 40, generator=torch.Generator().manual_seed(10 * step + 2 * wire.rank + micro))
                with wrapped.no_sync() if micro == 0 else nullcontext():
                    wrapped(x.bfloat16()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                with torch.no_grad():
                    wrapped.module[0].weight.clamp_(-0.1, 0.1)
        assert_same_model(model, twin, f"step {step}")
    return True


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


def test_parameters_of_several_dtypes_in_one_bucket():
    assert all(ranks.run(mixed, 2, 1))
    assert all(ranks.run(mixed, 2, 2))


def averages(wire):
    """EMA and schedule-free averages on every rank; gathers that the next forward pass waits for."""
    options = {"lr": 0.1, "ema_decay": 0.5, "master": "split"}
    model, zero, twin, whole = pair(wire, AdamW, BF16, 1, options, overlap=True)
    for step in range(3):
        backward(model, step, wire.rank)
        zero.step()
        assert zero._gathering.works
        backward(twin, step, wire.rank)
        whole.step()
        whole.zero_grad()
    with zero.ema_weights(), whole.ema_weights():
        assert_same_model(model, twin, "EMA")
        with pytest.raises(RuntimeError, match="are their EMA"):
            zero.step()
    assert_same_model(model, twin, "after the EMA")
    assert model.state_dict().keys() == twin.state_dict().keys()
    free, zero, beside, whole = pair(wire, ScheduleFreeAdamW, F32, 2, {"lr": 0.1})
    for step in range(3):
        for wrapped, optimizer in ((free, zero), (beside, whole)):
            optimizer.train()
            backward(wrapped, step, wire.rank)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.eval()
        assert_same_model(free, beside, f"average after step {step}")
    model, zero, twin, whole = pair(wire, torch.optim.AdamW, F32, 1, {"lr": 0.1, "foreach": False})
    for step in range(2):
        backward(model, step, wire.rank)
        zero.step()
        backward(twin, step, wire.rank)
        whole.step()
        whole.zero_grad()
    assert_same_model(model, twin, "torch's own")
    return True


def test_averages_overlap_and_optimizers_of_torch():
    assert all(ranks.run(averages, 2))


def refused(wire):
    model = model_of(wire)
    own = list(model.module.parameters())
    for given, options, error, text in (
            (model, {"stage": 3}, ValueError, "parallel.shard"),
            (own[:3], {}, ValueError, "not given to Zero"),
            ([nn.Parameter(torch.ones(2))], {}, ValueError, "wrap the model in fasttrain.parallel.DataParallel"),
            (model.reducer, {"overlap": True}, ValueError, "give the DataParallel itself"),
            (model, {"lr": -1.0}, ValueError, "Invalid learning rate"),
            (model, {"master": "split"}, ValueError, "master='split' is for"),
            (model_of(wire, wire="int8"), {}, ValueError, "wire='int8'")):
        with pytest.raises(error, match=re.escape(text)):
            Zero(given, AdamW, **options)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        Zero(model, torch.optim.AdamW, lr=-1.0)
    before = AdamW(model.module.parameters())
    backward(model, 0, wire.rank)
    assert model.reducer.method.name == "ordered"  # nothing was changed so far
    assert model.module.big.weight.grad is not None
    model.zero_grad()
    with pytest.raises(ValueError, match="differ") as caught:
        Zero(model, (AdamW, Lion)[wire.rank], lr=0.1)
    assert "optimizer" in str(caught.value)
    zero = Zero(own, AdamW, lr=0.1)
    backward(model, 0, wire.rank)
    with pytest.raises(RuntimeError, match=r"is stepped by a Zero, and a AdamW"):
        before.step()
    with pytest.raises(ValueError, match="another Zero already"):
        Zero(model, AdamW)
    with pytest.raises(RuntimeError, match="give it all groups"):
        zero.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="on which an optimizer relies"):
        model.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(RuntimeError, match="see `culprits`"):
        model.reducer.nonfinite()
    with pytest.raises(RuntimeError, match="as many batches"):
        model.join()
    with pytest.raises(ValueError, match="the norm 2 is known"):
        zero.clip_grad_norm_(1.0, math.inf)
    model.module.big.weight.data = model.module.big.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"big\.weight is no longer in the memory"):
        zero.step()
    shared = nn.Linear(4, 4)
    shared.bias = nn.Parameter(shared.weight.detach()[0])
    with pytest.raises(ValueError, match="share memory"):
        Zero(DataParallel(shared, mesh=wire), AdamW)
    reducer = Reducer(nn.Linear(4, 4).named_parameters(), wire)
    assert not Zero(reducer, Muon, lr=0.1).divided
    return True


def test_what_is_refused():
    assert all(ranks.run(refused, 2))


def test_shards_of_one_norm():
    """All gradients one: the norm is the root of their number, however they are cut."""
    for size in (1, 3):
        assert set(ranks.run(ones, size, nn.Linear(33, 40), 1)) == {math.sqrt(40 * 33 + 40)}
    assert set(ranks.run(ones, 2, nn.Linear(32, 16, bias=False), 2)) == {math.sqrt(512)}  # shards without padding


def ones(wire, bare, stage):
    model = DataParallel(bare, mesh=wire, bucket_cap_mb=0.002)
    zero = Zero(model, AdamW, stage=stage, lr=0.0, weight_decay=0.0)
    model(torch.ones(1, bare.in_features)).sum().backward()
    before = model.module.weight.detach().clone()
    norm = zero.clip_grad_norm_(1.0)
    zero.step()
    assert_same_bits(model.module.weight.detach(), before)
    return round(norm.item() ** 2) ** 0.5


def rare(wire):
    """A rank that has nothing of what takes random draws counts them too."""
    optimizers = []
    for divided in (True, False):
        torch.manual_seed(0)
        model = DataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(64, 64)).bfloat16(), mesh=wire)
        groups = [{"params": list(part.parameters()), "master": master}
                  for part, master in zip(model.module, ("stochastic", "none"), strict=True)]
        optimizer = Zero(groups, AdamW, lr=0.1) if divided else AdamW(groups, lr=0.1)
        for _ in range(2):
            losses = [part(torch.ones(part.in_features).bfloat16()).sum() for part in model.module]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    zero, whole = optimizers
    assert zero.consolidate(None)["param_groups"] == whole.state_dict()["param_groups"]
    return sum(piece.where[0] == 0 for piece in zero._pieces)


def test_draws_are_counted_on_every_rank():
    assert 0 in ranks.run(rare, 2)


def narrow(wire, stage):
    """bfloat16 on the wire: half the bytes, added and kept in float32."""
    model, exact = model_of(wire, F32, "bf16"), model_of(wire, F32)
    zero, beside = Zero(model, AdamW, stage=stage, lr=0.1), Zero(exact, AdamW, stage=stage, lr=0.1)
    sent, finer = [], 0
    for step in range(2):
        for wrapped in (exact, model):
            before = wire.bytes["reduce_scatter"]
            backward(wrapped, step, wire.rank, 2)
            sent.append(wire.bytes["reduce_scatter"] - before)
        for piece, twin in zip(zero._pieces, beside._pieces, strict=True):
            got, wanted = (one.grad_in(optimizer.method.shard(one.bucket)).flatten()
                           for one, optimizer in ((piece, zero), (twin, beside)))
            # Each of two addends is rounded by 2^-9 of itself, and none exceeds twice the largest mean.
            largest = wanted.abs().max() if wanted.numel() else 0.0
            assert ((got - wanted).abs() <= 2.0**-8 * largest).all(), piece.name
            finer += not got.bfloat16().float().equal(got)
        zero.step()
        beside.step()
        for (name, p), q in zip(model.module.named_parameters(), exact.module.parameters(), strict=True):
            assert all(other.equal(p) for other in wire.all_gather(p.detach().contiguous())), name
            with torch.no_grad():
                p.copy_(q)
    assert sent[0] == 2 * sent[1]
    assert finer  # the mean is not rounded to 16 bits again
    return True


@pytest.mark.parametrize("stage", [1, 2])
def test_sixteen_bits_on_the_wire(stage):
    assert all(ranks.run(narrow, 2, stage))


class Under:
    """A gather under way."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def wait(self):
        self.seen.append(self.name)


class Told(nn.Linear):
    def forward(self, x):
        SEEN.append(f"forward {self.in_features}")
        return super().forward(x)


SEEN: list[str] = []


def test_each_module_waits_for_its_own():
    """Blocks for theirs when they are called; everything else when the model is."""
    body = nn.ModuleList(nn.Sequential(Told(width, width + 1)) for width in (1, 2, 3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.last = Told(7, 1), body, Told(4, 1)

        def forward(self, x):
            x = self.first(x)
            for block in self.body:
                x = block(x)
            return self.last(x)

    model = Model()
    parts = {"last": model.last, "3": body[2], "2": body[1], "1": body[0], "first": model.first}
    memories = [SimpleNamespace(params=list(part.parameters())) for part in parts.values()]
    gathering = Gathering(memories, model)
    kept = model.state_dict()
    for read in (lambda: model(torch.ones(7)), model.state_dict, lambda: model.load_state_dict(kept), gathering.wait):
        SEEN.clear()
        gathering.works = {index: Under(name, SEEN) for index, name in enumerate(parts)}
        read()
        assert not gathering.works
        if SEEN[0] == "first":
            assert SEEN == ["first", "last", "forward 7", "1", "forward 1", "2", "forward 2", "3", "forward 3",
                            "forward 4"]
        else:
            assert sorted(SEEN) == sorted(parts)
