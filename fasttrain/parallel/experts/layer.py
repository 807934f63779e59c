"""A mixture of experts in the place of a feed-forward layer.

N tokens of this rank, k = top_k, C features, E experts, e ranks along the mesh's axis "expert".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fasttrain.dist.mesh import MEAN, Mesh
from fasttrain.dist.wire import Wire
from fasttrain.parallel.experts import balance
from fasttrain.parallel.experts.collected import Box, Boxed, shaped
from fasttrain.parallel.experts.moved import entering, exchanged, gathered, leaving, spread
from fasttrain.parallel.experts.plan import by_expert, capacity_of, capped, dropless
from fasttrain.parallel.experts.router import Router, Routing
from fasttrain.parallel.experts.weights import Activation, Experts


class Metrics(NamedTuple):
    """Of the last forward pass, on this rank; tensors without a graph, for which nobody has waited.

    Attributes:
        counts: (E,) int64, choices of each expert by this rank's tokens, those dropped among them.
        dropped: the share of choices that found no room, float32 of shape ().
        balance, z: the losses before they are weighted, of shape (). Where they are of all ranks, their mean over the
            ranks is that of all tokens.
    """

    counts: Tensor
    dropped: Tensor
    balance: Tensor
    z: Tensor


class Ranks:
    """The wires of a layer. Copies of the layer share them."""

    def __init__(self, mesh: Mesh | None, shared: bool):
        def wire(*axes: str) -> Wire | None:
            return None if mesh is None or mesh.count(*axes) == 1 else mesh.wire(*axes, use="experts")

        self.size = 1 if mesh is None else mesh.sizes["expert"]
        self.expert, self.tensor = wire("expert"), wire("tensor")
        self.mean = wire(*MEAN) if shared else None

    def __deepcopy__(self, memo: object) -> Ranks:
        return self


class MoE(Boxed):
    """Sends each token to the `top_k` best of several feed-forward layers, and adds up what they make of it.

    Without a capacity no token is dropped. With one, an expert takes ``capacity * N * top_k / experts`` tokens of each
    rank, rounded up: first choices before second ones, then in the order of tokens. A choice that finds no room adds
    nothing; what the others add is not scaled up. Then all sizes are known before the router has spoken: no rank waits
    for its device, and what is sent does not depend on the data.

    On a mesh with an axis "expert" of e ranks each holds E/e of the experts, whole. Tokens travel there and back, and
    so do derivatives: four times ``(e-1)/e * N * top_k * C`` elements a step if experts get alike; and once E numbers,
    so that ranks know what comes. With an axis "tensor", on all of whose ranks the tokens must be the same, the
    features within each expert are divided too, and outputs added up. All ranks take part in every pass, also those
    without tokens. Experts that no token reaches have a derivative of zeros, not None: an optimizer then treats them on
    every rank of their group alike, whoever had tokens for them.

    The gradient of an expert is the sum over the tokens of all e ranks, each of which derives the mean over its own: it
    is to be divided by all ranks over which the loss is a mean, as is every other (`Reducer` with a mesh does that).

    Arguments:
        width, hidden: features of a token, and within an expert.
        experts, top_k: how many there are, and how many a token goes to.
        capacity: None, or a factor on the tokens that an expert takes; 1.25 is usual.
        mesh: `fasttrain.parallel.Mesh`; its wires are made here, on all its ranks.
        activation, gated: of the experts; see `Experts`.
        score, normalise, scale, router_bias: of the `Router`.
        balance, z: factors of the load-balancing loss and of the router's z-loss. They reach the loss by `auxiliary` or
            `carry`; one of the two is to be called.
        statistics: "rank": the load-balancing loss looks at each rank's tokens alone; "global": at those of all ranks
            over which the loss is a mean, by one small all-reduce in each forward pass. Experts may then be unequally
            busy within a rank's own micro-batch.

    Attributes:
        router, experts: `Router` and `Experts`.
        metrics: of the last forward pass; None before the first.

    Raises:
        ValueError: numbers that do not fit, with the numbers.

    Example:
        >>> from fasttrain.parallel.experts import MoE, auxiliary
        >>> layer = MoE(width=16, hidden=32, experts=4, top_k=2)
        >>> x = torch.randn(2, 5, 16)
        >>> loss = layer(x).square().mean() + auxiliary(layer)
        >>> loss.backward()
        >>> int(layer.metrics.counts.sum())
        20

    Reference: Shazeer et al., arXiv 1701.06538; over ranks, Lepikhin et al., GShard, arXiv 2006.16668; dropless, Gale
    et al., MegaBlocks, arXiv 2211.15841.
    """

    def __init__(self, width: int, hidden: int, experts: int, top_k: int = 2, *, capacity: float | None = None,
                 mesh: Mesh | None = None, activation: str | Activation | None = None, gated: bool = False,
                 score: str = "softmax", normalise: bool | None = None, scale: float = 1.0, router_bias: bool = False,
                 balance: float = 1e-2, z: float = 1e-3, statistics: str = "rank",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        if capacity is not None and not 0 < capacity < float("inf"):
            raise ValueError(f"capacity={capacity}: it is a factor on the tokens that an expert takes: give a positive "
                             "number, 1.25 for example, or None to drop none")
        for name, factor in (("balance", balance), ("z", z)):
            if not 0 <= factor < float("inf"):
                raise ValueError(f"{name}={factor}: give 0 or more")
        if statistics not in ("rank", "global"):
            raise ValueError(f"statistics={statistics!r}: give 'rank' or 'global'")
        self.capacity, self.balance, self.z = capacity, balance, z
        self.router = Router(width, experts, top_k, score=score, normalise=normalise, scale=scale, bias=router_bias,
                             device=device, dtype=dtype)
        self.experts = Experts(width, hidden, experts, activation=activation, gated=gated, mesh=mesh, device=device,
                               dtype=dtype)
        self.ranks = Ranks(mesh, statistics == "global")
        self.box, self.weighted = Box(), bool(balance or z)
        self.metrics: Metrics | None = None

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x: (..., C). On the meta device shapes and operations only, those of equally busy experts."""
        width = self.router.weight.shape[1]
        if isinstance(x, DTensor):
            raise TypeError(f"a mixture of experts takes plain tensors, and got a DTensor placed {x.placements}: give "
                            "all tokens whole, x.full_tensor(), on every rank of the tensor axis")
        if x.dim() < 2 or x.shape[-1] != width:
            raise ValueError(f"tokens of shape {tuple(x.shape)}: give (..., {width}), with one dimension of tokens or "
                             "more before the features")
        tokens = x.reshape(-1, width)
        if x.is_meta:  # who counts operations has no numbers to route by, and no ranks to ask
            choices = F.linear(tokens, self.router.weight)[:, :1].expand(-1, self.router.top_k).reshape(-1, 1)
            found = self.experts.imagined(tokens.repeat_interleave(self.router.top_k, 0)) * choices
            return found.view(len(tokens), self.router.top_k, width).sum(1).to(x.dtype).view(x.shape)
        routing = self.router(tokens)
        if torch.is_autocast_enabled(x.device.type):  # so they travel in that dtype
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        if self.ranks.tensor is None:
            weights = routing.weights
        else:  # each rank of it has a term of their derivative
            tokens, weights = (entering(tensor, self.ranks.tensor) for tensor in (tokens, routing.weights))
        output, dropped = self._mixed(tokens, routing, weights)
        output = leaving(output, self.ranks.tensor).to(x.dtype)
        return shaped(self._told(output, routing, dropped), x.shape)

    def _mixed(self, tokens: Tensor, routing: Routing, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(what the experts make of the tokens, how many choices found no room)."""
        if self.capacity is None:
            plan = dropless(routing.chosen, self.router.experts)
            slots = self._sent(spread(tokens, plan), plan.counts)
            return gathered(slots, plan, weights), routing.counts.new_zeros(())
        room = capacity_of(self.capacity, len(tokens), self.router.top_k, self.router.experts)
        plan = capped(routing.chosen, self.router.experts, room)
        slots = self._sent_alike(spread(tokens, plan), room)
        return gathered(slots, plan, weights), (routing.counts - plan.counts).sum()

    def _sent(self, slots: Tensor, counts: Tensor) -> Tensor:
        """Through the experts, wherever they are, slots in the order of experts."""
        wire = self.ranks.expert
        if wire is None:
            return self.experts(slots, counts)
        everyones = torch.stack(wire.all_gather(counts)).view(wire.size, wire.size, -1)  # of rank, by rank, of expert
        received = everyones[:, wire.rank]
        sends, receives = torch.stack([everyones[wire.rank].sum(1), received.sum(1)]).tolist()  # the host waits here
        plan = by_expert(received, sum(receives))
        rows = spread(exchanged(slots, wire, sends, receives), plan)
        rows = gathered(self.experts(rows, plan.counts), plan)
        return exchanged(rows, wire, receives, sends)

    def _sent_alike(self, slots: Tensor, room: int) -> Tensor:
        """The same of `room` slots of each expert, whether they hold a token or not."""
        wire, width = self.ranks.expert, slots.shape[1]
        if wire is None:
            return self.experts.batched(slots.view(-1, room, width)).reshape(-1, width)
        if wire.backend == "gloo":
            self._check_alike(wire, room)
        split = [len(slots) // wire.size] * wire.size
        rows = exchanged(slots, wire, split, split).view(wire.size, -1, room, width)
        found = self.experts.batched(rows.transpose(0, 1).reshape(-1, wire.size * room, width))
        found = found.view(-1, wire.size, room, width).transpose(0, 1).reshape(-1, width)
        return exchanged(found, wire, split, split)

    def _check_alike(self, wire: Wire, room: int) -> None:
        found = [int(other) for other in wire.all_gather(torch.tensor([room], dtype=torch.int64))]
        if len(set(found)) > 1:
            raise ValueError(f"the ranks that share experts make {found} slots for each of them, so they have unequal "
                             "numbers of tokens: with a capacity all need as many; pad, or use capacity=None")

    def _told(self, output: Tensor, routing: Routing, dropped: Tensor) -> Tensor:
        """The output, with the losses; and the metrics, unless this repeats a pass that was told already."""
        of = balance.seen(routing, self.ranks.mean)
        losses = balance.load_balancing_loss(routing, of), balance.router_z_loss(routing, of)
        if torch._C._current_graph_task_id() == -1:
            choices = max(routing.chosen.numel(), 1)
            self.metrics = Metrics(routing.counts, (dropped / choices).float(), *(loss.detach() for loss in losses))
            if self.training:
                self.router.count(routing.counts)
        return self.box.attach(output, self.balance * losses[0] + self.z * losses[1]) if self.weighted else output

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, balance={self.balance}, z={self.z}"


def metrics(model: nn.Module) -> dict[str, Metrics]:
    """Those of all mixtures in a model that have run, by their names."""
    return {name: part.metrics for name, part in model.named_modules()
            if isinstance(part, MoE) and part.metrics is not None}
