"""The reducer on a GPU, at world size 1: NCCL, streams and the control that is read a step later."""

import pytest
import torch
from torch import nn

from fasttrain.dist.wire import Wire
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def wire():
    made = Wire(torch.device("cuda", 0), store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield made
    made.close()


@pytest.mark.parametrize("options", [{"wire": "ordered"}, {"wire": "bf16"}, {"wire": "int8"}, {"bucket_cap_mb": 0.01},
                                     {"grad_dtype": torch.float32}])
def test_as_the_bare_module(wire, options):
    dtype = torch.bfloat16 if "grad_dtype" in options else torch.float32
    models, optimizers = [], []
    for wrap in (lambda net: DataParallel(net, mesh=wire, **options), lambda net: net):
        torch.manual_seed(0)
        net = wrap(nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).to("cuda", dtype))
        models.append(net)
        optimizers.append(AdamW(net.parameters(), lr=1e-3))
    tolerance = {"bf16": 1e-2, "int8": 3e-2}.get(options.get("wire"), 1e-5 if dtype == torch.float32 else 1e-2)
    for step in range(5):
        x = torch.randn(8, 64, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(step))
        for net in models:
            net(x).square().mean().backward()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert ((p.grad - q.grad).norm() / q.grad.norm()).item() < tolerance
        norm = nn.utils.get_total_norm([p.grad for p in models[0].parameters()])
        torch.testing.assert_close(models[0].grad_norm(), norm.float(), rtol=2e-2 if tolerance > 1e-4 else 1e-5, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            q.data.copy_(p.data)  # the next gradients are compared at one point
