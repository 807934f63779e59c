"""What keeps tokens from all going to few experts: two losses, and a bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.parallel.experts.router import Router, Routing


class Seen(NamedTuple):
    """Of which tokens the statistics are.

    Attributes:
        counts: (E,) float, choices of each expert.
        tokens: how many there are; a tensor of shape () or a number.
        terms: of how many ranks' losses the mean is taken.
    """

    counts: Tensor
    tokens: Tensor | float
    terms: int


def seen(routing: Routing, wire: Wire | None) -> Seen:
    """Those of this rank, or with a wire those of all its ranks: one small all-reduce."""
    counts, own = routing.counts, len(routing.chosen)
    if wire is None:
        return Seen(counts.to(routing.logits.dtype), max(own, 1), 1)
    both = wire.sum_(torch.cat([counts, counts.new_tensor([own])]))
    return Seen(both[:-1].to(routing.logits.dtype), both[-1].clamp_min(1).to(routing.logits.dtype), wire.size)


def load_balancing_loss(routing: Routing, of: Seen) -> Tensor:
    r"""The load-balancing loss, 1 where all experts get alike, E / top_k where as few as possible get all.

    .. math:: E \sum_i f_i P_i

    f is the share of choices that an expert got, over all top_k choices, and P the mean of its shares of the tokens.
    It is linear in P, and f has no derivative. So if f is of all ranks, the mean over ranks of what each computes with
    its own P is the loss of all their tokens, as is its derivative: nothing is sent in backward. Where ranks have
    unequal numbers of tokens, each adds its own P by their number.

    Reference: Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4 to 6 (without the factor alpha); f of
    all ranks: Qiu et al., arXiv 2501.11873.
    """
    experts, choices = routing.logits.shape[1], routing.chosen.shape[1]
    received = of.counts / (of.tokens * choices)
    return experts * (received * routing.shares.sum(0)).sum() * (of.terms / of.tokens)


def router_z_loss(routing: Routing, of: Seen) -> Tensor:
    """The mean over tokens of the square of the logits' logsumexp, which keeps logits small.

    Reference: Zoph et al., ST-MoE, arXiv 2202.08906, equation 5.
    """
    return routing.logits.logsumexp(1).square().sum() * (of.terms / of.tokens)


@torch.no_grad()
def rebalance(model: nn.Module, rate: float = 1e-3, mesh: Mesh | None = None) -> None:
    """Move each expert's bias by `rate`: up if it got fewer choices than the mean since the last call, down if more.

    Call it after `optimizer.step()`, on every rank. It is instead of the load-balancing loss, or beside a small one.

    Arguments:
        model: whose routers were made with ``bias=True``.
        mesh: add up the choices of all ranks that read other tokens, in one collective for all layers.

    Raises:
        ValueError: no router has a bias.

    Example:
        >>> router = Router(4, experts=2, top_k=1, bias=True)
        >>> router.count(torch.tensor([3, 1]))                      # a layer counts what it sends
        >>> rebalance(router, rate=0.1)
        >>> router.bias
        tensor([-0.1000,  0.1000])

    Reference: Wang et al., arXiv 2408.15664, algorithm 1.
    """
    routers = [part for part in model.modules() if isinstance(part, Router) and part.bias is not None]
    if not routers:
        raise ValueError("no router of the model has a bias to be moved: make the mixtures with router_bias=True")
    loads = torch.cat([torch.zeros_like(router.weight[:, 0], dtype=torch.int64) if router.load is None else router.load
                       for router in routers])
    if mesh is not None and mesh.count(*MEAN) > 1:
        mesh.wire(*MEAN, use="experts").sum_(loads)
    for router, load in zip(routers, loads.split([router.experts for router in routers]), strict=True):
        assert router.bias is not None
        router.bias += rate * torch.sign(load.double().mean() - load).to(router.bias.dtype)
        router.load = None
