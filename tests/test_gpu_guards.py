"""Guards and schedules on a GPU: numbers arrive a step late, and nothing waits."""

import math

import pytest
import torch

from fasttrain import LossScaler
from fasttrain import schedules as s
from fasttrain.guards import Later, NonFinite, UpdateRatios
from fasttrain.optim import AdamW

pytestmark = pytest.mark.gpu


def test_numbers_arrive_one_step_late():
    later = Later()
    for step in range(5):
        told = later.put(step, loss=torch.tensor(2.0 * step, device="cuda"), flags=torch.tensor([True, False]).cuda(),
                         tokens=torch.tensor(2**40 + step, device="cuda"))
        if step:
            assert told == (step - 1, {"loss": 2.0 * step - 2, "flags": [1.0, 0.0], "tokens": 2**40 + step - 1}, None)


@pytest.mark.parametrize("scaled", [False, True])
def test_bad_steps_are_skipped_without_a_wait_and_named(scaled):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2).cuda()
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = s.Scheduler(optimizer, lr=s.linear(100))
    guard, scaler = NonFinite(model, most=9), LossScaler(1.0, dynamic=False) if scaled else None
    x, told, kept = torch.ones(2, 4, device="cuda"), [], None
    for step in range(9):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if step >= 3:
            model.bias.grad[0] = math.nan
        if step in (1, 2, 3):  # a bad step is known in the next: then its sums are read
            torch.cuda.set_sync_debug_mode("error")
        try:
            told.append(guard.step(optimizer, step, loss=loss, batch=step, max_norm=1.0, scaler=scaler))
            scheduler.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step == 3:
            kept = model.weight.detach().clone()
    told = [*told[1:], *guard.flush()]
    assert [one.kind for one in told] == ["good"] * 3 + ["bad"] * 6
    assert [one.names for one in told[3:]] == [("bias",)] * 6
    assert torch.equal(model.weight, kept)
    assert optimizer.param_groups[0]["lr"] == 0.1 * s.linear(100)(9)


def test_update_ratios():
    model = torch.nn.Linear(4, 2).cuda()
    optimizer, ratios = AdamW(model.parameters(), lr=0.1), UpdateRatios(model, every=1)
    model(torch.ones(1, 4, device="cuda")).sum().backward()
    before = model.weight.detach().clone()
    with ratios.measure(0):
        optimizer.step()
    assert ratios.update(0) is None
    wanted = ((model.weight - before).norm() / before.norm()).item()
    assert ratios.flush()[0].of["weight"] == pytest.approx(wanted, rel=1e-5)
