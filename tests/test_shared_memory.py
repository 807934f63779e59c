"""Parameters that share memory, or are one and the same."""

import pytest
import torch
from few import BACKENDS, parameters
from helpers import assert_same_bits, generator, needs_native, normal
from torch.nn import Parameter

from fasttrain.optim import SGD, AdamW


def test_duplicates_are_refused() -> None:
    p, q = parameters(sizes=((2,), (3,)))
    with (pytest.warns(UserWarning, match="duplicate parameters"),
          pytest.raises(ValueError, match=r"parameter 2 of group 0 .* occurs twice in its group: give it once")):
        AdamW([p, q, p])
    opt = AdamW([p])
    with (pytest.warns(UserWarning, match="duplicate parameters"),
          pytest.raises(ValueError, match=r"parameter 1 of group 1")):
        opt.add_param_group({"params": [q, q]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [p]})


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_parameters_that_share_memory_are_stepped_one_after_the_other(threads: int) -> None:
    """Two Parameters of one storage, as torch steps them: twice. Never at the same time by two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ends = []
        for backend in BACKENDS:
            numbers = generator(threads)
            whole = normal((16_384,), torch.float32, numbers)
            params = [Parameter(whole) if i % 5 else Parameter(whole[100:16_000]) for i in range(60)]
            opt = SGD(params, lr=0.5, momentum=0.9, backend=backend)
            for _ in range(2):
                for p in params:
                    p.grad = normal(p.shape, torch.float32, numbers)
                opt.step()
            ends.append(whole)
        assert_same_bits(*ends)
    finally:
        torch.set_num_threads(before)


def test_strided_parameters_that_share_memory(backend: str) -> None:
    """Copies that are written back must not lose one of two updates."""
    whole = torch.ones(8, 6)
    params = [Parameter(whole[:, ::2]), Parameter(whole[:, 1::2]), Parameter(whole[::2])]
    for p in params:
        p.grad = torch.ones_like(p)
    SGD(params, lr=0.25, backend=backend).step()
    assert_same_bits(whole, torch.ones(8, 6) - 0.25 - 0.25 * (torch.arange(8) % 2 == 0).float()[:, None])


@needs_native
def test_parameters_apart_are_stepped_by_all_threads() -> None:
    """Views of one flat storage, as sharding makes them, share no element."""
    from fasttrain.kernels.item import Item, apart

    flat = torch.ones(30)
    rule = SGD.rules[0]
    items = [Item("p", rule, (part, part.clone()), (), None) for part in flat.split(10)]
    assert apart(items)
    assert not apart([*items, Item("q", rule, (flat[9:10], flat[:1]), (), None)])
    assert apart([*items, Item("empty", rule, (flat[5:5], flat[:0]), (), None)])
