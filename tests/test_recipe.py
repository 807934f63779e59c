"""From a name to an optimizer."""

import dataclasses
import inspect

import pytest
import torch

from fasttrain.train import recipe
from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.model import GPT


def config(**options):
    return dataclasses.replace(TrainConfig(), **options)


@pytest.mark.parametrize("name", [*recipe.RECIPES, *("torch." + n for n in recipe.RECIPES
                                                         if hasattr(torch.optim, n) and n != "Muon")])
def test_every_recipe_builds_and_steps(name):
    model = GPT(layers=1, width=16, heads=2, positions=8)
    optimizer = recipe.build(config(optimizer=name), model)
    assert type(optimizer).__module__.startswith("torch.optim" if name.startswith("torch.") else "fasttrain.optim")
    decaying, plain = optimizer.param_groups
    assert all(p.ndim >= 2 for p in decaying["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert len(decaying["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert plain["weight_decay"] == 0
    assert optimizer.param_groups[0]["lr"] == recipe.RECIPES[name.removeprefix("torch.")]["lr"]
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.zeros(2, 8, dtype=torch.long)).logsumexp(-1).sum().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_the_user_gives_wins():
    assert recipe.settings(config(lr=0.25, weight_decay=0.0)) == {
        "lr": 0.25, "betas": recipe.RECIPES["AdamW"]["betas"], "weight_decay": 0.0}


def test_stock_and_ours_get_the_same_settings():
    assert recipe.settings(config()) == recipe.settings(config(optimizer="torch.AdamW"))


@pytest.mark.parametrize("options, message", [
    (dict(optimizer="Adamw"), "unknown; there are .*AdamW"),
    (dict(optimizer="torch.Adamw", lr=0.1), r"unknown; there are .*torch\.AdamW"),
    (dict(optimizer="jax.AdamW", lr=0.1), "write X for fasttrain.optim.X"),
    (dict(optimizer="torch.Optimizer", lr=0.1), "unknown"),
    (dict(optimizer="torch.ASGD"), "give one with --lr"),
    (dict(optimizer="torch.Rprop", lr=0.1, weight_decay=0.1), "does not take --weight-decay"),
    (dict(optimizer="torch.Muon"), "it takes matrices only.* Muon without torch. steps those"),
    (dict(optimizer="torch.LBFGS", lr=0.1), "its step calls the model again"),
    (dict(optimizer="torch.SparseAdam", lr=0.1), "sparse gradients only"),
    (dict(optimizer="torch.Adafactor", lr=0.1, zero=3), "--zero 3 with --optimizer torch.Adafactor: .*use Adafactor"),
    (dict(optimizer="torch.Rprop", lr=0.1, zero=3), "cannot step shards"),
    (dict(optimizer="Muon", ema=0.9), "--ema with --optimizer Muon: it .*; use AdamW"),
    (dict(optimizer="LAMB", zero=1, tensor=2), "--zero 1 with --tensor and .* LAMB: .*; use --zero 3, or 0"),
    (dict(optimizer="Muon", zero=2, expert=2), "--zero 2 with --expert and --optimizer Muon"),
])
def test_bad_optimizers_are_refused(options, message):
    with pytest.raises(BadInput, match=message) as caught:
        recipe.check(config(**options))
    assert "\n" not in str(caught.value)


def test_an_optimizer_without_a_recipe():
    recipe.check(config(optimizer="torch.ASGD", lr=0.1))
    optimizer = recipe.build(config(optimizer="torch.ASGD", lr=0.1), GPT(1, 16, 2, 8))
    assert isinstance(optimizer, torch.optim.ASGD)


def test_an_optimizer_without_decay():
    options = config(optimizer="torch.Rprop", lr=0.1)
    assert "weight_decay" not in inspect.signature(torch.optim.Rprop).parameters
    recipe.check(options)
    assert isinstance(recipe.build(options, GPT(1, 16, 2, 8)), torch.optim.Rprop)
