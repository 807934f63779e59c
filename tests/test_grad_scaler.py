"""torch's GradScaler around our steps: what it scales, and what it skips."""

import pytest
import torch
from few import assert_same_ends, ends, parameters
from helpers import assert_same_bits, generator, normal
from torch.nn import Parameter

from fasttrain.optim import SGD, AdamW, Lion, NAdam, Optimizer, ScheduleFreeAdamW


@pytest.mark.parametrize(("optimizer", "fused"), [(AdamW, True), (AdamW, None), (SGD, True), (SGD, None), (Lion, None),
                                                  (NAdam, None), (ScheduleFreeAdamW, None)])
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(optimizer: type[Optimizer], fused: bool | None, unscaled: bool, backend: str) -> None:
    """A power of two as scale is exact: the bits of an unscaled run. A step with an infinity changes nothing at all."""
    flag = {"fused": fused} if optimizer in (AdamW, SGD) else {}
    runs = []
    for scaled in (True, False):
        params = parameters()
        opt = optimizer(params, lr=0.1, **flag, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        for i in range(4):
            opt.zero_grad()
            numbers = generator(i)
            loss = sum((p * normal(p.shape, p.dtype, numbers)).sum() for p in params)
            if i == 2:
                if not scaled:
                    continue
                loss = loss + params[1].sum() * float("inf")
            before = [t.detach().clone() for t in ends(opt)]
            scaler.scale(loss).backward()
            grads = [p.grad.clone() for p in params]
            if unscaled:
                scaler.unscale_(opt)
            scaler.step(opt)
            if fused and not unscaled:  # the gradients are not rewritten
                for p, grad in zip(params, grads, strict=True):
                    assert_same_bits(p.grad, grad)
            scaler.update()
            if i == 2:
                for a, b in zip(ends(opt), before, strict=True):
                    assert_same_bits(a, b)
                assert scaler.get_scale() == 512.0
        runs.append(opt)
    assert_same_ends(*runs)


def test_found_inf_is_a_count_and_the_first_skipped_step_makes_no_state(backend: str) -> None:
    params = parameters()
    opt = AdamW(params, fused=True, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    opt.found_inf, opt.grad_scale = torch.tensor(3.0), torch.tensor(4.0)  # type: ignore[attr-defined]
    opt.step()
    assert not opt.state
    assert all(bool(p.isfinite().all()) for p in params)
    opt.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    opt.step()
    assert opt.state[params[0]]["step"] == 1


def test_a_scale_that_is_no_power_of_two_rounds_once_more(backend: str) -> None:
    p, q = Parameter(torch.zeros(100, dtype=torch.float64)), Parameter(torch.zeros(100, dtype=torch.float64))
    p.grad = normal((100,), torch.float64, generator(1))
    q.grad = p.grad / 3
    opt = SGD([p], lr=1.0, fused=True, backend=backend)
    opt.grad_scale, opt.found_inf = torch.tensor(3.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    opt.step()
    SGD([q], lr=1.0, backend=backend).step()
    torch.testing.assert_close(p, q, rtol=3e-16, atol=0)


def test_without_scaling_what_is_not_finite_propagates(backend: str) -> None:
    runs = []
    for optimizer in (AdamW, torch.optim.AdamW):
        p = Parameter(torch.ones(4))
        opt = optimizer([p])
        p.grad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
        opt.step()
        runs.append([p.detach().isfinite(), *(v.isnan() for v in opt.state[p].values())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
