"""A mixture of experts on one rank: against the loop over tokens, in its options, its values and its refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mixtures import grads, naive, values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.parallel.experts import MoE, Router, auxiliary, metrics, rebalance
from fasttrain.parallel.experts import grouped as products
from fasttrain.parallel.experts.plan import capped, dropless

WIDTH, HIDDEN, EXPERTS = 6, 10, 4
CASES: list[dict[str, Any]] = [
    {}, {"top_k": 1}, {"top_k": 1, "normalise": True}, {"top_k": 4, "normalise": False}, {"gated": True},
    {"activation": "gelu", "scale": 2.5}, {"score": "sigmoid", "top_k": 3}, {"score": "sigmoid", "normalise": False},
    {"capacity": 1.0}, {"capacity": 0.5, "gated": True}, {"capacity": 0.01, "top_k": 1}, {"capacity": 8.0},
    {"router_bias": True, "score": "sigmoid"}, {"capacity": 0.75, "top_k": 3, "router_bias": True}]


def made(**options: Any) -> MoE:
    torch.manual_seed(3)
    layer = MoE(WIDTH, HIDDEN, EXPERTS, dtype=torch.float64, **{"balance": 0.3, "z": 0.02, **options})
    if layer.router.bias is not None:
        layer.router.bias += torch.tensor([0.3, -0.2, 0.0, 0.1])
    return layer


def tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naively(layer: MoE, weights: dict[str, Tensor], x: Tensor, options: dict[str, Any]) -> Any:
    known = {key: value for key, value in options.items() if key not in ("gated", "router_bias")}
    if options.get("gated"):
        known["activation"] = "silu"
    return naive(weights, x, bias=layer.router.bias, **known)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_against_the_loop(options: dict[str, Any]) -> None:
    """Output, losses, counts, and the derivative by everything."""
    layer = made(**options)
    x = tokens(3, 5).requires_grad_()
    output = layer(x)
    (output.pow(2).sum() + auxiliary(layer)).backward()
    weights, y = values(layer), x.detach().clone().requires_grad_()
    wanted = naively(layer, weights, y, options)
    (wanted.output.pow(2).sum() + 0.3 * wanted.balance + 0.02 * wanted.z).backward()
    torch.testing.assert_close(output, wanted.output, rtol=1e-12, atol=1e-12)
    found = metrics(layer)[""]
    assert (found.counts.tolist(), float(found.dropped)) == (wanted.counts, pytest.approx(wanted.dropped / (
        15 * options.get("top_k", 2))))
    torch.testing.assert_close((found.balance, found.z), (wanted.balance.detach(), wanted.z.detach()), rtol=1e-12,
                               atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
    for name, grad in grads(layer).items():
        torch.testing.assert_close(grad, weights[name].grad, rtol=1e-10, atol=1e-12, msg=name)
    if "capacity" in options and options["capacity"] < 1:
        assert wanted.dropped > 0


def test_dropped_tokens_are_zero() -> None:
    layer = made(capacity=1e-6, top_k=1)  # one slot for each expert
    output = layer(tokens(15))
    assert int((output == 0).all(1).sum()) == 15 - int((metrics(layer)[""].counts > 0).sum())


def test_gradcheck() -> None:
    layer = made(gated=True, capacity=0.9, balance=0.0, z=0.0)
    assert torch.autograd.gradcheck(layer, tokens(7).requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("capacity", [None, 1.25])
def test_narrow(dtype: torch.dtype, tolerance: float, capacity: float | None) -> None:
    """Against the loop in float64 on the same numbers. bfloat16: three roundings of 2^-9 each on the way, and in the
    derivative as many again; the router is float32, so it chooses alike.
    """
    layer = made(capacity=capacity).to(dtype)
    x = tokens(3, 5).to(dtype).requires_grad_()
    output = layer(x)
    (output.pow(2).sum() + auxiliary(layer)).backward()
    weights = {name: p.double().detach().requires_grad_() for name, p in values(layer).items()}
    wanted = naively(layer, weights, x.detach().double(), {"capacity": capacity})
    (wanted.output.pow(2).sum() + 0.3 * wanted.balance + 0.02 * wanted.z).backward()
    assert output.dtype == dtype
    assert metrics(layer)[""].counts.tolist() == wanted.counts
    for found, exact in ((output, wanted.output), *((grad, weights[name].grad) for name, grad in grads(layer).items())):
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= tolerance * exact.norm()


def test_autocast_multiplies_in_its_dtype_and_routes_in_float32() -> None:
    layer, x = made().float(), tokens(3, 5).float()
    seen = []
    layer.router.register_forward_hook(lambda module, given, routing: seen.append(routing.logits.dtype))
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    (found.sum() + auxiliary(layer)).backward()
    assert seen == [torch.float32, torch.float32]
    assert 0 < float((found - plain).detach().norm()) <= 3e-2 * float(plain.detach().norm())  # as in test_narrow
    assert layer.experts.up.grad.dtype == torch.float32


# --- Odd numbers of tokens, ties, experts that nobody goes to ---------------------------------------------------------

@pytest.mark.parametrize("capacity", [None, 1.0])
def test_no_tokens(capacity: float | None) -> None:
    """Everything is zero, and nothing is None."""
    layer = made(capacity=capacity)
    x = tokens(0, 5).requires_grad_()
    output = layer(x)
    (output.sum() + auxiliary(layer)).backward()
    assert output.shape == x.grad.shape == (0, 5, WIDTH)
    assert all(bool((grad == 0).all()) for grad in grads(layer).values())
    assert float(metrics(layer)[""].dropped) == 0


@pytest.mark.parametrize("capacity", [None, 4.0])
def test_experts_without_tokens_have_a_gradient_of_zeros(capacity: float | None) -> None:
    layer = made(top_k=1, capacity=capacity, gated=True)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(EXPERTS, WIDTH) * 50)
    x = torch.zeros(5, WIDTH, dtype=torch.float64)
    x[:, 2] = 1
    (layer(x).pow(2).sum() + auxiliary(layer)).backward()
    assert metrics(layer)[""].counts.tolist() == [0, 0, 5, 0]
    for parameter in (layer.experts.up, layer.experts.gate, layer.experts.down):
        assert parameter.grad.flatten(1).norm(dim=1).bool().tolist() == [False, False, True, False]


def test_ties_go_to_the_lower_number() -> None:
    router = Router(4, experts=64, top_k=3)
    nn.init.zeros_(router.weight)
    assert router(torch.randn(100, 4)).chosen.tolist() == [[0, 1, 2]] * 100


@pytest.mark.parametrize("top_k", [1, 3])
def test_plans(top_k: int) -> None:
    """Each choice has a slot of its own, in the part of its expert; with little room, those who came first."""
    chosen = torch.stack([torch.randperm(5)[:top_k] for _ in range(40)])
    plan = dropless(chosen, 5)
    assert sorted(plan.places.flatten().tolist()) == list(range(40 * top_k))
    ends = plan.counts.cumsum(0)
    for n, choices in enumerate(plan.places.tolist()):
        for slot, expert in zip(choices, chosen[n].tolist(), strict=True):
            assert int(plan.origins[slot]) // top_k == n
            assert ends[expert] - plan.counts[expert] <= slot < ends[expert]
    limited = capped(chosen, 5, 3)
    for expert in range(5):
        came = [(choice, n) for choice in range(top_k) for n in range(40) if chosen[n, choice] == expert]
        wanted = [n * top_k + choice for choice, n in came[:3]] + [-1] * (3 - len(came))
        assert limited.origins[3 * expert : 3 * expert + 3].tolist() == wanted
        assert [int(limited.places[n, choice]) for choice, n in came] == [
            3 * expert + at if at < 3 else -1 for at in range(len(came))]


def test_torchs_grouped_products_are_those_of_the_loop() -> None:
    """The way of GPUs, in what torch has of it for the CPU; groups of no rows at both ends."""
    counts = torch.tensor([0, 5, 0, 11, 0])
    rows, weight, grad = torch.randn(16, 8), torch.randn(5, 12, 8), torch.randn(16, 12)
    for matrices, x in ((weight.transpose(1, 2), rows), (weight, grad)):
        torch.testing.assert_close(products._rows_in_one(x, matrices, counts), products._rows(x, matrices, counts))
    found = products._matrices_in_one(grad, rows, counts)
    torch.testing.assert_close(found, products._matrices(grad, rows, counts))
    assert bool((found[[0, 2, 4]] == 0).all())


# --- Repeated passes, copies, biases ----------------------------------------------------------------------------------

@pytest.mark.parametrize("capacity", [None, 0.75])
def test_recomputing_changes_nothing(capacity: float | None) -> None:
    layer = made(capacity=capacity, router_bias=True)
    other, x = copy.deepcopy(layer), tokens(3, 5).requires_grad_()
    (layer(x).pow(2).sum() + auxiliary(layer)).backward()
    y = x.detach().clone().requires_grad_()
    output = checkpoint(lambda z: other(z).pow(2), y, use_reentrant=False)  # all of the layer runs again
    (output.sum() + auxiliary(other)).backward()
    assert torch.equal(x.grad, y.grad)
    for name, grad in grads(layer).items():
        assert torch.equal(grad, grads(other)[name]), name
    assert torch.equal(layer.router.load, other.router.load)  # counted once


def test_bias_brings_balance() -> None:
    """A skewed router; the bias alone brings all experts near the mean."""
    torch.manual_seed(0)
    layer = MoE(8, 8, 4, 2, balance=0.0, z=0.0, router_bias=True, score="sigmoid")
    x = torch.randn(256, 8) + 0.3
    with torch.no_grad():
        layer.router.weight[0] += 1
        layer(x)
        before = metrics(layer)[""].counts
        rebalance(layer, 0.01)
        for _ in range(60):
            layer.router.count(layer.router(x).counts)
            rebalance(layer, 0.02)
        layer(x)
    after = metrics(layer)[""].counts
    assert int(before.max() - before.min()) > 100
    assert int(after.max() - after.min()) <= 20  # 0.02 of a score at a time: tokens change over a few at a time
    layer.eval()(x)
    assert int(layer.router.load.sum()) == 512  # of the last pass in training: evaluation does not count
    assert [name for name, _ in layer.named_buffers()] == list(layer.state_dict())[1:2] == ["router.bias"]


def test_balance_of_equal_and_of_one() -> None:
    """1 where all experts get alike, the number of experts where one gets all."""
    layer = MoE(4, 4, 4, 1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4) * 100)
    layer(torch.eye(4))
    assert float(metrics(layer)[""].balance) == pytest.approx(1)
    layer(torch.eye(4)[[1, 1, 1]])
    assert float(metrics(layer)[""].balance) == pytest.approx(4)


def test_parameters_are_named_and_initialised() -> None:
    layer = MoE(64, 128, 8, gated=True)
    assert [name for name, _ in layer.named_parameters()] == ["router.weight", "experts.up", "experts.gate",
                                                              "experts.down"]
    assert float(layer.experts.down.detach().std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(layer.experts.gate.detach().std()) == pytest.approx(64**-0.5, rel=0.05)
    with torch.device("meta"):
        assert MoE(64, 128, 8).experts.up.is_meta


def test_operations_are_counted_on_meta() -> None:
    """Those of the router and of two of eight experts, with three matrices each."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        assert MoE(16, 32, 8, gated=True)(torch.zeros(3, 5, 16)).shape == (3, 5, 16)
    assert counter.get_total_flops() == 2 * 15 * 16 * (8 + 2 * 3 * 32)


# --- Refusals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, said", [
    ({"top_k": 5}, "top_k=5 of 4 experts: .* give top_k from 1 to 4"), ({"top_k": 0}, "top_k=0 of 4"),
    ({"capacity": 0}, "capacity=0: it is a factor"), ({"capacity": -1.0}, "capacity=-1.0"),
    ({"capacity": float("inf")}, "or None to drop none"), ({"score": "tanh"}, "'softmax' or 'sigmoid'"),
    ({"activation": "tanh"}, "squared_relu, relu, gelu, silu"), ({"balance": -1.0}, "balance=-1.0: give 0 or more"),
    ({"statistics": "all"}, "statistics='all'"), ({"hidden": 0}, "hidden=0: give 1 or more")])
def test_numbers_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MoE(**{"width": WIDTH, "hidden": HIDDEN, "experts": EXPERTS, **options})


@pytest.mark.parametrize("shape", [(WIDTH,), (5, WIDTH + 1), (2, WIDTH, 3)])
def test_tokens_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \(.*\): give \(..., 6\)"):
        made()(torch.zeros(shape))


def test_a_bias_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no router of the model has a bias"):
        rebalance(made())
