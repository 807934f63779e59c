"""Blocks that are recomputed or compiled: the same bits, fewer kept activations, the same names."""

import copy

import pytest
import torch
from torch import nn

from fasttrain.train.blocks import compile_blocks, recompute
from fasttrain.train.model import GPT
from fasttrain.train.objective import loss_of
from fasttrain.train.usage import count_flops


def made():
    torch.manual_seed(0)
    model = GPT(layers=4, width=32, heads=2, positions=16, ngrams=2, rows=32)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)  # no block is the identity
    return model


def trained(model):
    """Loss and gradients of one batch, and how many bytes autograd kept for the backward pass."""
    batch = torch.arange(4 * 17).view(4, 17) % 251
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())], sum(kept.values())


@pytest.mark.parametrize("how, blocks", [("full", 4), ("2", 2), ("selective", 4)])
def test_recomputing_keeps_less_and_changes_no_bit(how, blocks):
    expected, whole = trained(made())
    model = made()
    assert len(recompute(model, how)) == blocks
    assert list(model.state_dict()) == list(made().state_dict())
    results, kept = trained(model)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert kept < (0.8 if how == "2" else 0.6) * whole, (kept, whole)


def operations(how):
    """Of matrix products and attention in a forward and backward pass."""
    model = made()
    if how is not None:
        recompute(model, how)
    return count_flops(lambda: loss_of(model, torch.arange(4 * 17).view(4, 17) % 251).backward())[1]


def test_products_and_attention_are_computed_once_only_where_they_are_kept():
    assert operations("selective") == operations(None) < operations("2") < operations("full")


class Counting(nn.Module):
    """A block that tells its products."""

    def __init__(self):
        super().__init__()
        self.linear, self.runs = nn.Linear(8, 8), 0

    def forward(self, x):
        self.runs += 1
        return torch.tanh(self.linear(x)).exp()


def test_a_copy_of_a_recomputed_model_is_its_own():
    model = nn.Sequential(nn.Linear(8, 8), Counting())
    recompute(model, blocks=[model[1]])
    twin = copy.deepcopy(model)
    twin(torch.ones(1, 8)).sum().backward()
    assert (model[1].runs, twin[1].runs) == (0, 2)
    assert model[1].linear.weight.grad is None


def test_what_cannot_be_recomputed():
    with pytest.raises(ValueError, match="has no ModuleList"):
        recompute(nn.Linear(2, 2))
    for how in ("0", "half", "-1"):
        with pytest.raises(ValueError, match="'full', 'selective', or every how many"):
            recompute(made(), how)
    model = made()
    recompute(model, "2")
    with pytest.raises(ValueError, match="replaced already"):
        recompute(model)


def test_blocks_compile_to_the_same_code():
    expected, _ = trained(made())
    model = made()
    recompute(model)
    assert len(compile_blocks(model, backend="aot_eager")) == 4
    results, _ = trained(model)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="has no ModuleList"):
        compile_blocks(nn.Linear(2, 2))
