"""Attention over sequences that are cut over ranks: the numbers of one process, the bytes of the formula."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.context import ContextParallel

B, T, C, D = 2, 24, 16, 4
BOUND = 1e-10  # float64: what is added in another order


class Layer(nn.Module):
    """Attention with a residual, of H heads of which several share a key-value head."""

    def __init__(self, heads, kv_heads, causal=True):
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.norm, self.qkv = nn.LayerNorm(C), nn.Linear(C, (heads + 2 * kv_heads) * D)
        self.out = nn.Linear(heads * D, C)

    def forward(self, x, attention, where):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (-1, D)).transpose(1, 2).split(
            (self.heads, self.kv_heads, self.kv_heads), 1)
        q, k = q * where[:, None].cos(), k * (1 + where[:, None].sin())  # attention that depends on positions
        y = attention(q, k, v, causal=self.causal)
        return x + self.out(y.transpose(1, 2).flatten(2))


def sdpa(q, k, v, *, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def made(heads, kv_heads, causal=True):
    torch.manual_seed(0)
    model = nn.ModuleList(Layer(heads, kv_heads, causal) for _ in range(2)).double()
    return model, torch.randn(B, T, C, dtype=torch.float64), torch.randn(B, T, C, dtype=torch.float64)


def results(model, x, targets, attention, where, recompute=False):
    """Loss, output, and gradients of the input and of all parameters."""
    x = x.requires_grad_()
    y = x
    for layer in model:
        y = checkpoint(layer, y, attention, where, use_reentrant=False) if recompute else layer(y, attention, where)
    loss = (y - targets).square().mean()
    loss.backward()
    return loss.detach(), y.detach(), [x.grad, *(p.grad for p in model.parameters())]


def cut_over(wire, heads, kv_heads, balanced, causal, recompute):
    context = ContextParallel(Mesh(context=wire.size, watch=False), balanced=balanced)
    model, x, targets = made(heads, kv_heads, causal)
    where = context.positions(T)
    mine = context.cut(x, 1).detach(), context.cut(targets, 1), context.attention, where, recompute
    with FlopCounterMode(display=False) if recompute else nullcontext():  # in which few kinds of tensors can be made
        loss, y, gradients = results(model, *mine)
    with torch.no_grad():
        whole = [context.whole(y, 1), context.whole(gradients[0], 1) / wire.size]  # the loss is a mean over ranks
    sent = dict(context.wire.bytes)
    for tensor in (loss, *gradients[1:]):
        wire.mean_(tensor)
    return loss, whole, gradients[1:], sent


@pytest.mark.parametrize("size, heads, kv_heads, balanced, causal, recompute", [
    (2, 4, 4, True, True, False), (2, 4, 2, False, True, True), (4, 4, 1, True, True, True),
    (4, 2, 2, False, False, False)])
def test_ranks_together_compute_what_one_does(size, heads, kv_heads, balanced, causal, recompute):
    model, x, targets = made(heads, kv_heads, causal)
    expected_loss, expected_y, expected = results(model, x, targets, sdpa, torch.arange(T))
    answers = run(cut_over, size, heads, kv_heads, balanced, causal, recompute)
    for loss, (y, dx), gradients, _ in answers:
        torch.testing.assert_close(loss, expected_loss, rtol=BOUND, atol=BOUND)
        torch.testing.assert_close(y, expected_y, rtol=BOUND, atol=BOUND)
        for ours, theirs in zip((dx, *gradients), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=BOUND, atol=BOUND)


def cut_places(wire):
    mesh = Mesh(context=wire.size, watch=False)
    return [ContextParallel(mesh, balanced=balanced).positions(16).tolist() for balanced in (True, False)]


def test_which_positions_a_rank_has():
    assert run(cut_places, 4) == [
        [[0, 1, 14, 15], [0, 1, 2, 3]], [[2, 3, 12, 13], [4, 5, 6, 7]],
        [[4, 5, 10, 11], [8, 9, 10, 11]], [[6, 7, 8, 9], [12, 13, 14, 15]]]


@pytest.mark.parametrize("kv_heads, recompute", [(4, False), (1, True)])
def test_bytes_are_those_of_the_formula(kv_heads, recompute):
    size, layers = 2, 2
    one_way = 2 * (size - 1) / size * B * T * kv_heads * D * 8  # keys and values of float64
    shown = 2 * (size - 1) / size * B * T * C * 8  # what the test itself gathers, to compare
    for *_, sent in run(cut_over, size, 4, kv_heads, True, True, recompute):
        assert sent["all_gather"] == layers * one_way * (2 if recompute else 1) + shown
        assert sent["reduce_scatter"] == layers * one_way


def in_sixteen_bits(wire):
    context = ContextParallel(Mesh(context=wire.size, watch=False))
    q = torch.ones(1, 2, 4, 4)  # rotated in float32, as angles are
    with torch.autocast("cpu", torch.bfloat16):
        return context.attention(q, q, q.bfloat16()).dtype, context.wire.bytes.total()


def test_autocast_casts_before_anything_travels():
    assert run(in_sixteen_bits, 2) == [(torch.bfloat16, 2 * 2 * 4 * 4 * 2)] * 2


def embedded(wire):
    """A table of which each rank looks up all tokens, and uses its own: its gradient is that of the whole."""
    context = ContextParallel(Mesh(context=wire.size, watch=False))
    torch.manual_seed(1)
    table, tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (2, 8))
    weights = torch.randn(2, 8, 3, dtype=torch.float64)
    (context.cut(table[tokens], 1) * context.cut(weights, 1)).mean().backward()
    mine = wire.mean_(table.grad.clone())
    table.grad = None
    (table[tokens] * weights).mean().backward()
    back = context.whole(context.cut(tokens, 1), 1)
    return mine, table.grad, torch.equal(back, tokens)


def test_a_cut_after_the_embedding_and_its_inverse():
    for mine, expected, same in run(embedded, 2):
        torch.testing.assert_close(mine, expected, rtol=BOUND, atol=BOUND)
        assert same


def refused(wire):
    mesh = Mesh(context=wire.size, watch=False)
    balanced, plain = ContextParallel(mesh), ContextParallel(mesh, balanced=False)
    q, k = torch.zeros(1, 4, 6, 2), torch.zeros(1, 3, 6, 2)
    attempts = [
        lambda: balanced.cut(torch.zeros(1, 10, 3), 1), lambda: plain.positions(7), lambda: plain.cut(torch.zeros(0)),
        lambda: balanced.attention(q, k, k), lambda: balanced.attention(q, q, q[:, :, :4]),
        lambda: balanced.attention(q[:, :, :3], q[:, :, :3], q[:, :, :3]),
        lambda: ContextParallel(mesh, method="ring"), lambda: ContextParallel(mesh, method="circle")]
    said = []
    for attempt in attempts:
        with pytest.raises(ValueError, match=r".") as error:
            attempt()
        said.append(str(error.value))
    return said


def test_what_cannot_be_cut_is_refused_alike_on_every_rank():
    answers = run(refused, 2)
    assert answers[0] == answers[1]
    for text, parts in zip(answers[0], [
            ("a sequence of 10 positions over 2 ranks", "multiple of 4", "or balanced=False"),
            ("a sequence of 7 positions", "multiple of 2"), ("a sequence of 0 positions",),
            ("4 query heads cannot share 3",), ("of the same positions",), ("3 positions of this rank are no 2",),
            ("torch has ring attention for GPUs only", "method='gather'"), ("'gather' or 'ring'",)], strict=True):
        assert all(part in text for part in parts), text


def alone(wire):
    context = ContextParallel(Mesh(watch=False))
    q = torch.randn(1, 2, 6, 4)
    with context.step(6):
        y = context.attention(q, q, q)
    return torch.equal(y, sdpa(q, q, q, causal=True)), torch.equal(context.whole(context.cut(q, 2), 2), q), context.wire


def test_a_single_rank_sends_nothing():
    assert run(alone, 1) == [(True, True, None)]
