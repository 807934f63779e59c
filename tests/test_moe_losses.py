"""The losses of mixtures reach the gradients once for each forward pass, or the step fails."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from mixtures import grads, naive, values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fasttrain.parallel.experts import MoE, auxiliary, carry, metrics


def called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


class Model(nn.Module):
    """Two mixtures behind one another, the second used twice."""

    def __init__(self, **options: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = (MoE(4, 6, 3, 2, dtype=torch.float64, **{"balance": 0.5, "z": 0.1, **options})
                                   for _ in "12")
        self.wrap: Callable[..., Tensor] = called

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.second):
            x = x + self.wrap(layer, x)
        return x


X = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def wanted(parts: int = 1) -> dict[str, Tensor]:
    """By the loop, with the losses of each pass added by hand."""
    model = Model()
    weights = {name: values(getattr(model, name)) for name in ("first", "second")}
    for x in X.chunk(parts):
        total = torch.zeros((), dtype=torch.float64)
        for name in ("first", "second", "second"):
            found = naive(weights[name], x)
            x = x + found.output
            total = total + 0.5 * found.balance + 0.1 * found.z
        ((x.pow(2).sum() + total) / parts).backward()
    return {f"{outer}.{name}": p.grad for outer, some in weights.items() for name, p in some.items()}


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_added() -> None:
    model = Model()
    (model(X).pow(2).sum() + auxiliary(model)).backward()
    check(model, wanted())


@pytest.mark.parametrize("carried", [False, True])
def test_micro_batches(carried: bool) -> None:
    """All forward passes before the first backward, as in GPipe; taken after each."""
    model, losses = Model(), []
    if carried:
        carry(model, torch.tensor(1 / 3, dtype=torch.float64))
    for x in X.chunk(3):
        loss = model(x).pow(2).sum()
        losses.append(loss if carried else loss + auxiliary(model))
    for loss in losses:
        (loss / 3).backward()
    check(model, wanted(3))


def test_carried_over_stages() -> None:
    """The output of one stage is cut off the graph, as between ranks of a pipeline."""
    model = Model()
    carry(model)
    middle = X + model.first(X)
    end = middle.detach().requires_grad_()
    x = end
    for _ in "12":
        x = x + model.second(x)
    x.pow(2).sum().backward()
    middle.backward(end.grad)
    check(model, wanted())


@pytest.mark.parametrize("carried", [False, True])
def test_recomputed(carried: bool) -> None:
    """The pass that is repeated in backward adds nothing."""
    model = Model()
    model.wrap = lambda layer, x: checkpoint(lambda z: layer(z) * torch.ones_like(z), x, use_reentrant=False)
    if carried:
        carry(model)
    loss = model(X).pow(2).sum()
    (loss if carried else loss + auxiliary(model)).backward()
    check(model, wanted())
    assert (model.first.box.take(), model.second.box.take()) == ([], [])


def test_recomputed_as_torch_once_did() -> None:
    """Its forward passes have no graph: losses can be carried, and else there is an error."""
    model = Model()
    model.wrap = lambda layer, x: checkpoint(layer, x, use_reentrant=True)
    x = X.clone().requires_grad_()
    output = model(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        auxiliary(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        output.sum().backward()
    carry(model)
    model.zero_grad()
    model(x).pow(2).sum().backward()
    check(model, wanted())


def test_forgotten() -> None:
    model = Model()
    loss = model(X).sum()
    with pytest.raises(RuntimeError, match="nobody has added: add auxiliary"):
        loss.backward()


def test_taken_twice() -> None:
    model = Model()
    model(X)
    with pytest.raises(RuntimeError, match="no forward pass with gradients has run"):
        auxiliary(model)  # its output is gone, and so are its losses
    output = model(X)
    auxiliary(model)
    with pytest.raises(RuntimeError, match="no forward pass with gradients has run since they were taken"):
        auxiliary(model)
    del output


def test_carried_ones_are_not_added() -> None:
    model = Model()
    carry(model)
    output = model(X)
    with pytest.raises(RuntimeError, match="would count twice"):
        auxiliary(model)
    carry(model, None)
    with pytest.raises(RuntimeError, match="nobody has added"):
        output.sum().backward()


def test_passes_whose_output_is_dropped_count_for_nothing() -> None:
    model = Model()
    for _ in range(3):
        model(X * 3)
    (model(X).pow(2).sum() + auxiliary(model)).backward()
    check(model, wanted())
    assert len(model.first.box._slips) <= 1


def test_nothing_keeps_a_graph() -> None:
    """Of a pass whose output is gone nothing is left, taken or not."""
    model = Model()
    for take in (True, False):
        output = model(X)
        slips = [slip for layer in (model.first, model.second) for slip in layer.box._slips]
        assert len(slips) == 3
        assert all(slip() is not None for slip in slips)
        loss = auxiliary(model) if take else None
        del output, loss
        gc.collect()
        assert all(slip() is None for slip in slips)
    assert all(tensor.grad_fn is None for tensor in metrics(model)["second"])


def test_evaluation_has_no_losses() -> None:
    model = Model()
    with torch.no_grad():
        model(X)
        assert auxiliary(model) == 0
    assert metrics(model)["second"].counts.sum() == 30


def test_without_weights_there_is_nothing_to_add() -> None:
    model = Model(balance=0.0, z=0.0)
    model(X).sum().backward()
    assert auxiliary(model) == 0
    assert float(metrics(model)["first"].balance) > 0


def test_a_model_without_mixtures() -> None:
    with pytest.raises(ValueError, match="no part of the model is a MoE"):
        auxiliary(nn.Linear(2, 2))


def test_copies() -> None:
    """A copy has losses of its own."""
    model = Model()
    output = model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        (other(X).pow(2).sum() + auxiliary(other)).backward()
        check(other, wanted())
    (output.pow(2).sum() + auxiliary(model)).backward()
    check(model, wanted())
