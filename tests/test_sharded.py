"""Stage 3: a model divided by `shard` trains as a whole one on all data, with the exchange in gloo's place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fasttrain.optim
from fasttrain.dist import accounting
from fasttrain.dist.fingerprint import DisagreementError
from fasttrain.optim import SGD, AdamW, consolidate
from fasttrain.optim.local import local
from fasttrain.parallel import DataParallel, shard
from fasttrain.parallel.shardable import blocks_of

WIDTH = 16


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def mesh_of(shape: tuple[int, ...]) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape):])


def batch(step: int, rank: int, micro: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + 10 * rank + micro)).to(dtype)


def loss_of(model: Any, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def means(model: nn.Module, step: int, shape: tuple[int, ...], micros: int) -> list[Tensor]:
    """The mean gradient as one process computes it: micro-batches added on each rank, then shards, then copies."""
    dtype = next(model.parameters()).dtype
    grid = torch.arange(torch.Size(shape).numel()).view(-1, shape[-1])
    return [(one / grid.numel()).to(dtype) for one in added(
        [added([added([one_gradient(model, batch(step, rank, micro, dtype)) for micro in range(micros)])
                for rank in row.tolist()]) for row in grid])]


def one_gradient(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [grad.float() for grad in torch.autograd.grad(loss_of(model, x), list(model.parameters()))]


def added(several: list[list[Tensor]]) -> list[Tensor]:
    total, *rest = several
    for one in rest:
        total = [a + b for a, b in zip(total, one, strict=True)]
    return total


def trained(wire: Any, name: str, dtype: torch.dtype, options: dict[str, Any], arguments: dict[str, Any],
            shape: tuple[int, ...]) -> None:
    model, whole = Net(dtype), Net(dtype)
    sharded = shard(model, mesh_of(shape), blocks="layers", watch=False, **arguments)
    kind = getattr(fasttrain.optim, name)
    ours, theirs = kind(model.named_parameters(), **options), kind(whole.named_parameters(), **options)
    for step in range(3):
        accumulate = sharded.accumulate(micros := 1 + step % 2)
        for micro in range(micros):
            with accumulate():
                loss_of(model, batch(step, wire.rank, micro, dtype)).backward()
        assert accumulate.ends
        for p, mean in zip(whole.parameters(), means(whole, step, shape, micros), strict=True):
            p.grad = mean
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert_same_bits(p.grad.full_tensor(), q.grad, f"a gradient of step {step}")
        norm = ours.clip_grad_norm_(0.05)
        torch.testing.assert_close(norm, theirs.clip_grad_norm_(0.05), rtol=1e-6, atol=0)
        theirs._clip = ours._clip
        ours.step()
        theirs.step()
        ours.zero_grad()
    for (key, value), other in zip(consolidate(model.state_dict()).items(), whole.state_dict().values(), strict=True):
        assert_same_bits(value, other, key)
    got, want = consolidate(ours.state_dict())["state"], theirs.state_dict()["state"]
    assert got.keys() == want.keys()
    for index, state in want.items():
        for key, value in state.items():
            assert_same_bits(got[index][key], value, f"{key} of parameter {index}")


@pytest.mark.parametrize(("name", "dtype", "options", "arguments", "shape"), [
    ("AdamW", torch.float32, dict(lr=1e-2), {}, (2,)),
    ("AdamW", torch.bfloat16, dict(lr=1e-2, master="split", state_dtype="bf16", ema_decay=0.9),
     dict(reduce_dtype=torch.float32), (2,)),
    ("Muon", torch.float32, dict(lr=1e-2), dict(reshard_after_forward=False), (2,)),
    ("AdamW", torch.float32, dict(lr=1e-2), {}, (2, 2)),
], ids=str)
def test_trains_as_the_whole(name: str, dtype: torch.dtype, options: Any, arguments: Any, shape: Any) -> None:
    ranks.run(trained, torch.Size(shape).numel(), name, dtype, options, arguments, shape)


def as_on_the_first_rank(wire: Any) -> None:
    """Layers are found, the first rank's parameters count, and items must have been counted."""
    model = Net()
    if wire.rank:
        nn.init.zeros_(model.head.weight)
    sharded = shard(model, watch=False)
    assert [type(one).__name__ for one in model.layers] == ["FSDPSequential"] * 3
    assert_same_bits(model.head.weight.detach().full_tensor(), Net().head.weight.detach())
    optimizer = AdamW(model.parameters(), lr=1e-2)
    loss_of(model, batch(0, wire.rank, 0, torch.float32)).backward()
    with pytest.raises(RuntimeError, match="no items were counted"):
        sharded.step(optimizer)


def test_the_model_of_the_first_rank_is_sharded() -> None:
    ranks.run(as_on_the_first_rank, 2)


def sent(wire: Any) -> None:
    """Each synchronised backward pass exchanges every group of gradients once, and each pass gathers every group of
    parameters once more; torch's own collectives are not called."""
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch sent")

    for name in ("reduce_scatter_tensor", "reduce_scatter_single", "all_gather_into_tensor", "all_gather_single"):
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, refuse)
    for wanted, width in (("same", 4), ("bf16", 2)):
        model = Net()
        sharded = shard(model, blocks="layers", wire=wanted, watch=False)
        before, gathered = sharded.wire.bytes["reduce_scatter"], sharded.wire.bytes["all_gather"]
        with sharded.no_sync():
            loss_of(model, batch(0, wire.rank, 0, torch.float32)).backward()
        assert not sharded.wire.calls["reduce_scatter"]
        loss_of(model, batch(0, wire.rank, 1, torch.float32)).backward()
        assert sharded.wire.calls["reduce_scatter"] == 4  # three blocks, and the rest
        padded = sum(-(-p.shape[0] // 2) * 2 * p.numel() // p.shape[0] for p in model.parameters())
        got = sharded.wire.bytes["reduce_scatter"] - before
        assert got == padded * width // 2
        assert sharded.wire.bytes["all_gather"] - gathered == 2 * 2 * padded * 4 // 2
        assert got < accounting.bytes_per_step(0, padded, 2, width, width)  # gloo's all-reduce, by the formula
        assert sharded.bytes_per_step(width, 4, 3) - sharded.bytes_per_step(0, 4, 3) == sharded.elements * width / 2


def test_the_exchange_is_used() -> None:
    ranks.run(sent, 2)


def test_blocks_that_a_stage_has_dropped_are_passed_over() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    model.layers[0] = None  # type: ignore[assignment]
    assert blocks_of(model, None) == blocks_of(model, "layers") == [model.layers[1]]


def refused(wire: Any) -> None:
    early = SGD((model := Net()).parameters(), lr=0.1)
    for error, words, arguments in (
            (ValueError, "'int8' does not go with fully_shard: codes", dict(wire="int8")),
            (ValueError, "'ordered' does not go with fully_shard", dict(wire="ordered")),
            (ValueError, "contradict", dict(wire="bf16", reduce_dtype=torch.float32)),
            (TypeError, "reduce_dtype is torch.int8", dict(reduce_dtype=torch.int8)),
            (ValueError, "names no ModuleList or Sequential within the model: it has layers", dict(blocks="blocks")),
            (ValueError, "the model itself", dict(blocks=[model])),
            (ValueError, "not within", dict(blocks=[nn.Linear(1, 1)])),
            (TypeError, "takes a DeviceMesh", dict(mesh=wire)),
            (ValueError, "needs names", dict(mesh=init_device_mesh("cpu", (1, 2))))):
        with pytest.raises(error, match=words):
            shard(model, **arguments)
        assert not any(hasattr(p, "placements") for p in model.parameters())
    with pytest.raises(TypeError, match="wrapped in DataParallel"):
        shard(parallel := DataParallel(model, mesh=wire))
    with pytest.raises(ValueError, match="another wrapper"):
        shard(model, watch=False)
    parallel.reducer.remove()

    sharded = shard(model, watch=False)
    with pytest.raises(ValueError, match="the model is sharded already"):
        shard(model)
    with pytest.raises(ValueError, match="DTensor"):
        DataParallel(model, mesh=wire)
    with pytest.raises(TypeError, match="PowerSGD"):
        sharded.register_comm_hook(None, print)
    with pytest.raises(RuntimeError, match="make the optimizer after shard"):
        early.step()
    with pytest.raises(TypeError, match="cannot divide"):
        sharded.step(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = SGD(model.parameters(), lr=0.1)
    before = local(model.head.weight).clone()
    arrival = optimizer.step_on_arrival(accumulation=2)
    with pytest.raises(RuntimeError, match="leave accumulation at 1"), sharded.accumulate(2)():
        raise AssertionError("not reached")
    arrival.remove()
    optimizer.step_on_arrival()
    with sharded.no_sync():
        loss_of(model, batch(0, wire.rank, 0, torch.float32)).backward()
    assert torch.equal(local(model.head.weight), before)
    loss_of(model, batch(0, wire.rank, 1, torch.float32)).backward()
    assert not torch.equal(local(model.head.weight), before)

    other = Net()
    if wire.rank:
        other.head = nn.Linear(WIDTH, 4)
    with pytest.raises(DisagreementError, match=r"head.weight.: shape: \[4, 16\] on rank 1"):
        shard(other, watch=False)


def test_what_cannot_work_is_told() -> None:
    ranks.run(refused, 2)


def fails(wire: Any, watcher: Any) -> None:
    sharded = shard(Net(), blocks="layers", watch=watcher)
    for step in range(3):
        if step == 1 and wire.rank:
            raise ValueError("the data is broken")
        loss_of(sharded.module, batch(step, wire.rank, 0, torch.float32)).backward()


def test_a_failure_is_told_where_torch_waits() -> None:
    first, second = ranks.faulty(fails, 2)
    assert first.code
    assert second.code
    assert "rank 1" in first.text
    assert "the data is broken" in first.text
    assert first.at - second.at < 5


class Sometimes(Net):
    """With a layer that one rank uses only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        h = self.first(x)
        return self.head(self.extra(h) if extra else h)


def unused_on_one(wire: Any, watcher: Any) -> None:
    sharded = shard(Sometimes(), blocks="layers", watch=watcher)
    sharded.module(batch(0, wire.rank, 0, torch.float32), wire.rank == 0).sum().backward()
    ranks.mark("PASSED")


def test_a_parameter_that_is_used_on_one_rank_only_ends_all() -> None:
    """`fully_shard` sends the gradients that a rank has: never those of one layer as those of another."""
    for one in ranks.faulty(unused_on_one, 2):
        assert one.code
        assert "PASSED" not in one.text
        assert re.search(r"the ranks issue different collectives: collective \d+ is reduce_scatter of", one.text), one


def parts(wire: Any, watcher: Any) -> None:
    """One rank calls the model twice, as in a validation of its own, while the other goes on to backward."""
    sharded = shard(Net(), blocks="layers", watch=watcher)
    loss = loss_of(sharded.module, batch(0, wire.rank, 0, torch.float32))
    if wire.rank:
        loss = loss_of(sharded.module, batch(0, wire.rank, 0, torch.float32))
    loss.backward()


def test_ranks_that_call_the_model_differently_are_told() -> None:
    for ended in ranks.faulty(parts, 2):
        assert ended.code
        assert "the ranks issue different collectives" in ended.text
