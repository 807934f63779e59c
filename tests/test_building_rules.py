"""First values of weights: their distributions, and that nothing but seed, name and place decides on them."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from torch import nn

from fasttrain.parallel.building import Constant, Normal, Ones, Rule, TruncNormal, Uniform, Zeros, materialize
from fasttrain.parallel.building.places import indices
from fasttrain.parallel.building.rules import key_of
from fasttrain.precision.draws import random_bits
from fasttrain.precision.quantile import logarithm, normal_quantile, root, share

pytestmark = pytest.mark.usefixtures("one_thread")
MANY = 1 << 18


# --- The quantile -----------------------------------------------------------------------------------------------------

def test_quantile_is_that_of_the_normal_distribution() -> None:
    generator = torch.Generator().manual_seed(1)
    even = torch.rand(5000, generator=generator, dtype=torch.float64)
    small = 10 ** (-10 * torch.rand(5000, generator=generator, dtype=torch.float64))
    u = torch.cat([even, small, 1 - small, torch.tensor([0.5, 0.075, 0.925, 2.0**-34, 1 - 2.0**-34]).double()])
    u = u.clamp(2.0**-34, 1 - 2.0**-34)
    wanted = torch.tensor([NormalDist().inv_cdf(float(x)) for x in u], dtype=torch.float64)
    torch.testing.assert_close(normal_quantile(u), wanted, rtol=1e-14, atol=1e-15)


def test_the_root_is_rounded_correctly() -> None:
    """numpy's is the processor's, which is."""
    x = torch.rand(MANY, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 24 + 0.07
    assert_same_bits(root(x), torch.from_numpy(np.sqrt(x.numpy())))


def test_the_logarithm() -> None:
    x = torch.cat([torch.linspace(1e-3, 1, 10001, dtype=torch.float64), 2.0 ** torch.arange(-34, 1).double()])
    torch.testing.assert_close(logarithm(x), x.log(), rtol=5e-16, atol=2e-16)


def test_shares_are_middles() -> None:
    assert share(torch.tensor([0, (1 << 32) - 1])).tolist() == [2.0**-33, 1 - 2.0**-33]


# --- Distributions ----------------------------------------------------------------------------------------------------

class Told:
    """Mean, standard deviation, fourth moment about the mean in units of the variance squared."""

    def __init__(self, mean: float, std: float, fourth: float):
        self.mean, self.std, self.fourth = mean, std, fourth


def truncated(low: float, high: float) -> Told:
    """Of a standard normal within bounds, by a sum over middles."""
    n = NormalDist()
    u = np.linspace(n.cdf(low), n.cdf(high), 20001)
    x = np.array([n.inv_cdf(each) for each in (u[1:] + u[:-1]) / 2])
    return Told(x.mean(), x.std(), float((((x - x.mean()) / x.std()) ** 4).mean()))


CASES = [(Normal(), Told(0, 1, 3)), (Normal(0.02, 3.0), Told(3, 0.02, 3)),
         (Uniform(-1, 3), Told(1, 4 / math.sqrt(12), 1.8)), (TruncNormal(), truncated(-2, 2)),
         (TruncNormal(1.0, 0.0, -0.5, 3.0), truncated(-0.5, 3))]


@pytest.mark.parametrize("rule, told", CASES)
def test_moments(rule: Rule, told: Told) -> None:
    """Within five standard errors, of several names."""
    for name in ("a", "blocks.11.up.weight"):
        x = rule.values(key_of(3, name), torch.arange(MANY), torch.float64)
        error = told.std / math.sqrt(MANY)
        assert abs(float(x.mean()) - told.mean) <= 5 * error
        assert abs(float(x.var()) / told.std**2 - 1) <= 5 * math.sqrt((told.fourth - 1) / MANY)
        z = (x - told.mean) / told.std
        for apart in (1, 2, 64, 1000):
            assert abs(float((z[apart:] * z[:-apart]).mean())) <= 5 / math.sqrt(MANY)


def test_normal_is_normal() -> None:
    """The largest distance of the distribution function: Kolmogorov's, below its value of one in a million."""
    x = Normal().values(key_of(0, "w"), torch.arange(MANY), torch.float64).sort().values
    wanted = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    steps = torch.arange(MANY, dtype=torch.float64) / MANY
    assert float((wanted - steps).abs().max()) <= 2.7 / math.sqrt(MANY)


def test_names_and_seeds_are_apart() -> None:
    values = [Normal().values(key_of(seed, name), torch.arange(MANY), torch.float64)
              for seed, name in ((0, "a"), (1, "a"), (0, "b"), (-1, "a"), (2**64 - 2, "a"))]
    for one in range(len(values)):
        for other in range(one):
            assert abs(float((values[one] * values[other]).mean())) <= 5 / math.sqrt(MANY)


def test_far_places() -> None:
    """Beyond 2^32 elements others are drawn."""
    near, far = torch.arange(1000), torch.arange(1000) + (1 << 32)
    rule, key = Normal(), key_of(0, "a")
    assert abs(float((rule.values(key, near) * rule.values(key, far)).mean())) < 5 / math.sqrt(1000)
    assert not torch.equal(rule.values(key, near), rule.values(key, far))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_roundings(dtype: torch.dtype) -> None:
    """Of what float64 gives, by way of float32."""
    exact = normal_quantile(share(random_bits(key_of(0, "a"), torch.arange(1000))))
    found = Normal().values(key_of(0, "a"), torch.arange(1000), dtype)
    assert_same_bits(found, exact if dtype == torch.float64 else exact.float().to(dtype))
    assert_same_bits(Ones().values(0, torch.arange(3), dtype), torch.ones(3, dtype=dtype))
    assert_same_bits(Zeros().values(0, torch.arange(3), dtype), torch.zeros(3, dtype=dtype))
    assert_same_bits(Constant(0.1).values(0, torch.arange(3), dtype), torch.full((3,), 0.1, dtype=dtype))


def test_bounds() -> None:
    x = TruncNormal(0.5, 0.0, -1.0, 1.0).values(key_of(0, "a"), torch.arange(MANY))
    assert -1 <= float(x.min()) <= -0.99
    assert 0.99 <= float(x.max()) <= 1


@pytest.mark.parametrize("make, words", [
    (lambda: Normal(-1.0), "a standard deviation is 0 or more"), (lambda: Uniform(1.0, 0.0), "the lower bound first"),
    (lambda: Uniform(0.0, math.inf), "both finite"), (lambda: TruncNormal(1.0, 0.0, 5.0, 6.0), "less than 0.001"),
    (lambda: TruncNormal(0.0), "less than 0.001")])
def test_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- Places -----------------------------------------------------------------------------------------------------------

def test_places_of_a_whole_tensor() -> None:
    found = list(indices(torch.empty(5, 7), torch.device("cpu"), 8))
    assert torch.equal(torch.cat([places for _, places in found]), torch.arange(35))
    assert [at.stop - at.start for at, _ in found] == [8, 8, 8, 8, 3]
    assert list(indices(torch.empty(0, 7), torch.device("cpu"))) == []


# --- The distributions of torch's modules -----------------------------------------------------------------------------

MODULES: list[Any] = [
    lambda: nn.Linear(256, 200), lambda: nn.Embedding(100, 300, padding_idx=3), lambda: nn.EmbeddingBag(100, 300),
    lambda: nn.Conv1d(64, 32, 9), lambda: nn.Conv2d(32, 64, 5, groups=4), lambda: nn.ConvTranspose2d(32, 64, 5),
    lambda: nn.LayerNorm(5000), lambda: nn.RMSNorm(5000), lambda: nn.GroupNorm(2, 4000), lambda: nn.BatchNorm1d(4000),
    lambda: nn.LSTM(50, 100), lambda: nn.GRUCell(50, 100), lambda: nn.Bilinear(30, 40, 50), lambda: nn.PReLU(3000),
    lambda: nn.MultiheadAttention(120, 4, add_bias_kv=True), lambda: nn.MultiheadAttention(120, 4, kdim=60, vdim=40)]


@pytest.mark.parametrize("make", MODULES)
def test_defaults_are_torchs(make: Any) -> None:
    """Least, largest and standard deviation of each tensor are those that torch's own initialisation has."""
    torch.manual_seed(0)
    wanted = make()
    with torch.device("meta"):
        found = materialize(make(), seed=0, device="cpu")
    for (name, one), other in zip(found.state_dict().items(), wanted.state_dict().values(), strict=True):
        one, other = one.double(), other.double()
        if float(other.std() if other.numel() > 1 else 0) == 0:
            assert_same_bits(one, other, name)
            continue
        error = 6 * math.sqrt(1 / other.numel())  # of both together, of distributions as broad as the normal one
        assert abs(float(one.std() / other.std()) - 1) <= error, name
        assert abs(float(one.mean() - other.mean())) <= error * float(other.std()), name
        if abs(float(other.abs().max() / other.std()) - math.sqrt(3)) < 0.1:  # uniform
            assert abs(float(one.abs().max() / other.abs().max()) - 1) <= 20 / other.numel(), name
    if isinstance(found, nn.Embedding):
        assert_same_bits(found.weight[3].detach(), torch.zeros(300))


def test_tensor_types() -> None:
    """Parameters stay trainable or frozen, and keep dtype, layout and what was put on them."""
    with torch.device("meta"):
        model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    model.weight.requires_grad_(False).mark = "kept"
    materialize(model, seed=1)
    assert (model.weight.requires_grad, model.bias.requires_grad, model.weight.mark) == (False, True, "kept")
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        plain = materialize(nn.Conv2d(8, 8, 3, dtype=torch.bfloat16), seed=1)
    assert_same_bits(model.weight.contiguous(), plain.weight.detach())
