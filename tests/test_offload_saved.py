"""What goes on around an offloaded step: checkpoints, copies, averages, scalers, schedules, as without offloading."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from fake_link import FakeLink
from stored import same
from test_offload import BF16, SIZES, assert_same, both, give, linked, params_of, run

from fasttrain.optim import convert


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    return linked(monkeypatch)


@pytest.mark.parametrize("options", [{}, dict(storage="8-byte", ema_decay=0.9)], ids=["plain", "8-byte"])
def test_checkpoints_go_both_ways(link: FakeLink, options: dict[str, object]) -> None:
    ours, plain = both("AdamW", BF16, **options)
    run(ours, 0, 3)
    run(plain, 0, 3)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    assert len(file.getvalue()) < 1.1 * sum(v.nbytes for p in params_of(ours) for v in ours.state[p].values()) + 40_000
    file.seek(0)
    saved = torch.load(file)
    taken, given = both("AdamW", BF16, **options)
    calls = []
    taken.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    taken.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
    for new, old, state in ((taken, ours, copy.deepcopy(plain.state_dict())), (given, plain, saved)):
        with torch.no_grad():
            for p, q in zip(params_of(new), params_of(old), strict=True):
                p.copy_(q)
        new.load_state_dict(state)
        run(new, 3, 6)
    run(plain, 3, 6)
    assert calls == ["pre", "post"]
    assert_same(taken, plain)
    assert_same(given, plain)
    with pytest.raises(ValueError, match="convert"):
        taken.load_state_dict(both("AdamW", BF16, master="fp32")[1].state_dict() | {"state": saved["state"]})
    assert_same(taken, plain)


def test_conversion(link: FakeLink) -> None:
    ours, plain = both("AdamW", BF16)
    other, wanted = both("AdamW", BF16, storage="8-byte")
    for optimizer, target in ((ours, other), (plain, wanted)):
        run(optimizer, 0, 2)
        with torch.no_grad():
            for p, q in zip(params_of(target), params_of(optimizer), strict=True):
                p.copy_(q)
        target.load_state_dict(convert(optimizer.state_dict(), target))
        run(target, 2, 4)
    assert_same(other, wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))],
                         ids=["deepcopy", "pickle"])
def test_copies(link: FakeLink, copied: object) -> None:
    ours, plain = both("AdamW", BF16, storage="8-byte")
    run(ours, 0, 2)
    run(plain, 0, 2)
    other = copied(ours)  # type: ignore[operator]
    assert other.offload
    for optimizer in (ours, other, plain):
        run(optimizer, 2, 4)
    assert_same(other, plain)
    assert_same(ours, plain)
    assert params_of(other)[0] is not params_of(ours)[0]


def test_averages_and_full_precision(link: FakeLink) -> None:
    ours, plain = both("AdamW", BF16, master="split", ema_decay=0.5)
    for optimizer in (ours, plain):
        optimizer.load_full_precision([torch.full(p.shape, 1 / 3) for p in params_of(optimizer)])
        run(optimizer, 0, 3)
        with optimizer.ema_weights():
            optimizer.seen = [p.detach().clone() for p in params_of(optimizer)]
            with pytest.raises(RuntimeError, match="after the `with` block"):
                optimizer.step()
        with torch.no_grad():
            params_of(optimizer)[0].add_(1.0)
        optimizer.full = optimizer.full_precision()
        run(optimizer, 3, 6)
        optimizer.load_full_precision(optimizer.full)
        run(optimizer, 6, 8)
    same(ours.seen, plain.seen, "averages")
    same(ours.full, plain.full, "full precision")
    assert_same(ours, plain)


def test_schedule_free_turns(link: FakeLink) -> None:
    ours, plain = both("ScheduleFreeSGD")
    for optimizer in (ours, plain):
        run(optimizer, 0, 2)
        optimizer.eval()
        optimizer.seen = [p.detach().clone() for p in params_of(optimizer)]
        optimizer.train()
        run(optimizer, 2, 4)
    same(ours.seen, plain.seen, "averages")
    assert_same(ours, plain)


def test_torch_scaler_and_schedule(link: FakeLink) -> None:
    ours, plain = both("SGD", momentum=0.9)
    for optimizer in (ours, plain):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        for step in range(5):
            give(optimizer, step)
            if step == 2:
                params_of(optimizer)[0].grad = torch.full(SIZES[0], torch.nan)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        optimizer.scale = scaler.get_scale()
    assert ours.scale == plain.scale
    assert_same(ours, plain)
