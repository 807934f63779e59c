"""Step counts of every kind that counts; those that cannot are named."""

import pytest
import torch
from few import assert_same, give, parameters, snapshot
from helpers import assert_same_bits
from torch import Tensor

from fasttrain.optim import AdamW


@pytest.mark.parametrize("count", [torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64), torch.tensor(3),
                                   torch.tensor(3, dtype=torch.int32), torch.tensor([3.0])], ids=str)
def test_step_counts_of_any_kind(count: Tensor, backend: str) -> None:
    ends = []
    for step in (count.clone(), torch.tensor(3.0)):
        params = parameters(sizes=((6,),))
        give(params)
        opt = AdamW(params, backend=backend)
        opt.state[params[0]] = {"step": step, "exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6)}
        opt.step()
        opt.step()
        assert step.item() == 5
        assert step.dtype in (count.dtype, torch.float32)
        ends.append(params[0])
    assert_same_bits(*ends)


def test_a_checkpoint_with_a_plain_number_as_step(backend: str) -> None:
    params = parameters(sizes=((6,),))
    opt = AdamW(params, backend=backend)
    give(params)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0]["step"] = 41  # as torch wrote it before 1.12
    opt.load_state_dict(saved)
    opt.step()
    assert opt.state[params[0]]["step"].item() == 42


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool], ids=str)
def test_step_counts_that_cannot_count(dtype: torch.dtype, backend: str) -> None:
    params = parameters(sizes=((6,), (3,)))
    give(params)
    opt = AdamW(params, backend=backend)
    opt.step()
    opt.state[params[1]]["step"] = torch.ones((), dtype=dtype)
    before = snapshot(params, opt)
    with pytest.raises(TypeError, match=r"parameter 1 of group 0.*its step count is torch\.\w+ of shape \(\)"):
        opt.step()
    assert_same(snapshot(params, opt), before)
    opt.state[params[1]]["step"] = 3
    with pytest.raises(TypeError, match=r"its step count is a int, not a tensor; load .* with load_state_dict"):
        opt.step()
