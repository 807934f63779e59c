"""The file that makes process groups and issues collectives.

A `Wire` is passed to whoever needs one; nothing here is global, and there is one place to replace in a test. Each has a
process group of its own, so that its collectives never meet those of the program around it. Elsewhere there are those of
a mesh's own group, in the middle of a model that is divided (`along`, `fasttrain.parallel.tensor.cut`), and what stages of
a pipeline send each other over a wire's group, as torch's schedules do.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fasttrain.dist import attempt, exchange, naming
from fasttrain.dist.scratch import Scratch
from fasttrain.dist.stages import Lines, OnDevice, Stage, Staged, Ticket
from fasttrain.dist.work import Ended, Nobody, Post, Single, Waits, Watch, WireError, Work
from fasttrain.kernels import norm

__all__ = ["Wire", "WireError", "Work"]

MARGIN_S = 5  # torch's own limit is longer by this: ours speaks first, and names the peer


class Wire:
    """One process's place among `size`, and the collectives they share.

    Every rank issues the same collectives in the same order. Those that return a `Work` run while the program goes on;
    their tensors are not to be written before its end, nor read if they are results.

    Args:
        device: where the tensors live. A CPU speaks gloo, a GPU NCCL.
        timeout_s: seconds after which a peer that does not answer is given up.
        group: who takes part: a process group of torch's, a `DeviceMesh` of one dimension, or the ranks. None: all.
            Only its members make the wire, all of them.
        watch: the `fasttrain.dist.watcher.Watcher` of this process: an error then says which rank failed, and why. It
            may be set later, as a watcher is made when torch.distributed has been initialized.
        options: handed to ``torch.distributed.init_process_group`` if that has not been called. Without any, rank, size
            and address come from the environment, as torchrun sets it (`fasttrain.dist.attempt`).

    Attributes:
        rank, size: within the group.
        ranks: the members' numbers among all processes.
        calls, bytes: by kind of collective, how many, and the bytes that this rank has put on the wire by the
            formula of a ring, or of an exchange in pairs, which are the same.
        waits: its `seconds` are those for which the host has waited for results. On a GPU it hardly ever does.

    Raises:
        WireError: the peers did not meet in time.
        ValueError: this process is not in the group, the mesh has several dimensions, or options came too late.
    """

    def __init__(self, device: torch.device, timeout_s: float = 120,
                 group: dist.ProcessGroup | DeviceMesh | Sequence[int] | None = None, watch: Watch | None = None,
                 **options: Any):
        self.device, self.timeout_s = device, timeout_s
        self.watch: Watch = watch or Nobody()
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self._everything = not dist.is_initialized()
        if self._everything:
            if self.backend == "nccl":
                options["device_id"] = device
            options["timeout"] = timedelta(seconds=timeout_s)
            self._try("meeting the other processes", lambda: dist.init_process_group(
                self.backend, **attempt.options(options, timeout_s)))
        elif options:
            raise ValueError(f"{', '.join(options)} came too late: torch.distributed is initialized; give no options")
        self.ranks = ranks_of(group)
        if dist.get_rank() not in self.ranks:
            raise ValueError(f"this process is rank {dist.get_rank()}, and the group consists of ranks {self.ranks}: "
                             f"make the wire in its members only")
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self._try("meeting the other processes", self._meet)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits = Waits()
        self._lines = Lines()
        self._issued = 0
        self.scratch = Scratch(device)
        self._stream = torch.cuda.Stream(device) if self.backend == "nccl" else None

    @classmethod
    def over(cls, group: dist.ProcessGroup | DeviceMesh | Sequence[int], device: torch.device | None = None,
             timeout_s: float = 120, watch: Watch | None = None) -> Wire:
        """The wire of a group, or of one dimension of a mesh: ``Wire.over(mesh["dp"])``."""
        if device is None:
            kind = group.device_type if isinstance(group, DeviceMesh) else "cpu"
            device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        return cls(device, timeout_s, group, watch)

    def _meet(self) -> None:
        with naming.by_members(self.ranks):
            self.group = dist.new_group(self.ranks, timedelta(seconds=self.timeout_s + MARGIN_S), self.backend,
                                        use_local_synchronization=True, group_desc="fasttrain")

    @property
    def sent(self) -> int:
        """Bytes that this rank has put on the wire."""
        return self.bytes.total()

    # --- Waiting ------------------------------------------------------------------------------------------------------

    def mean_(self, tensor: Tensor) -> Tensor:
        """Replace a floating-point tensor by its mean over the processes, in place, the same bits on each.

        Each divides before the sum, so that no intermediate value is larger than the largest input.
        """
        return self.sum_(tensor.div_(self.size))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes, in place, the same bits on each."""
        self.all_reduce(tensor).wait()
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Replace a tensor by that of one rank, in place."""
        self._single("broadcast", tensor.nbytes, tensor.nbytes * (self.size - 1) // self.size,
                     lambda: dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)).wait()
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """A small tensor of each rank, in their order; shape and dtype are the same on all."""
        return list(self.all_gather_async(tensor).wait())

    def all_gather_async(self, tensor: Tensor) -> Work:
        """`all_gather` under way: its result is one tensor, of shape (ranks, *shape)."""
        if self.backend == "gloo":
            return exchange.everyones(self, tensor)
        found = tensor.new_empty(self.size, *tensor.shape)
        return self._single("all_gather", found.nbytes, found.nbytes - tensor.nbytes, lambda: _all_gather(
            found, tensor.contiguous(), group=self.group, async_op=True), lambda: found)

    def gather_objects_json(self, text: str) -> list[str]:
        """A text of each rank, in their order, of any length; all ranks get all."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        lengths = [int(n) for n in self.all_gather(torch.tensor([len(data)], device=self.device))]
        padded = torch.nn.functional.pad(data, (0, max(lengths) - len(data)))
        found = self.all_gather(padded) if max(lengths) else [padded] * self.size
        return [bytes(t[:n].tolist()).decode() for t, n in zip(found, lengths, strict=True)]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.sum_(torch.zeros(1, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    # --- Under way ----------------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Work:
        """Replace a tensor by its "sum", "avg", "min", "max" or "bor" over the ranks, in place, the same bits on each.

        "avg" costs gloo a pass of its own over the tensor before the sum: give the factor to the kernel that fills a
        bucket instead. NCCL has it built in.
        """
        chosen = OPERATIONS[op]
        if op == "avg" and self.backend == "gloo":
            tensor.div_(self.size)
            chosen = dist.ReduceOp.SUM
        return self._single("all_reduce", tensor.nbytes, 2 * tensor.nbytes * (self.size - 1) // self.size,
                            lambda: dist.all_reduce(tensor, chosen, group=self.group, async_op=True))

    def reduce_scatter(self, out: Tensor, bucket: Tensor, op: str = "sum", scale: float = 1.0,
                       squares: bool = False) -> Work:
        """Write this rank's part of the sum over ranks of a flat `bucket` into `out`.

        Arguments:
            out: of a size-th of the bucket's elements; it may be this rank's part of it. On gloo of any floating-point
                dtype, added in float32; on NCCL of the bucket's.
            op: "sum" or "avg".
            scale: a factor more; on NCCL one pass over `out`.
            squares: the work's result is then the sum of squares of `out` and its non-finite flag, as of
                `fasttrain.kernels.chunks.sum_chunks`; else None.
        """
        exchange.check_cut(bucket, self.size)
        if self.backend == "gloo":
            factor = scale / self.size if op == "avg" else scale
            return exchange.reduce_scatter(self, out, bucket, factor, squares)

        def finish() -> Any:
            if scale != 1:
                out.mul_(scale)
            if squares:
                sums, nonfinite = norm.squares([out])
                return sums[0], nonfinite

        return self._single("reduce_scatter", bucket.nbytes, bucket.nbytes - out.nbytes, lambda: _reduce_scatter(
            out, bucket, OPERATIONS[op], group=self.group, async_op=True), finish)

    def all_gather_into(self, out: Tensor, shard: Tensor) -> Work:
        """Write the flat shards of all ranks, in their order, into the flat `out`; `shard` may be a part of it."""
        exchange.check_cut(out, self.size)
        if self.backend == "gloo":
            return exchange.all_gather(self, out, shard)
        return self._single("all_gather", out.nbytes, out.nbytes - shard.nbytes, lambda: _all_gather(
            out, shard, group=self.group, async_op=True))

    def all_to_all(self, into: Sequence[Tensor], sends: Sequence[Tensor]) -> Work:
        """Give ``sends[r]`` to rank r, and write what rank r gives into ``into[r]``."""
        if self.backend == "gloo":
            return exchange.all_to_all(self, into, sends)
        away = sum(t.nbytes for t in sends) - sends[self.rank].nbytes  # none, perhaps, of what others have to send
        self.issue("all_to_all", 0, away)
        return Single(self._post(), "all_to_all", away, self._try("all_to_all", lambda: dist.all_to_all(
            list(into), list(sends), group=self.group, async_op=True)), polled=False)

    # --- What the exchange is made of ---------------------------------------------------------------------------------

    def issue(self, kind: str, nbytes: int, sent: int) -> Ticket:
        """Count a collective; what it sends later, from whatever thread, is known by this number."""
        self._issued += 1
        self.calls[kind] += 1
        self.bytes[kind] += sent
        self.watch.issued(self.group.group_name, self._issued, kind, nbytes)
        return Ticket(self._issued, kind, nbytes)

    def post(self, ticket: Ticket, sends: Sequence[Tensor | None], into: Sequence[Tensor | None],
             half: int = 1) -> list[Any]:
        """Messages between pairs of ranks: see `exchange.Links`.

        On gloo each carries a tag of the collective's number, kind and size: where ranks disagree nothing is ever taken
        for something else, and the timeout says who waits for what.
        """
        todo: list[tuple[Callable[..., Any], int, Tensor]] = [
            (dist.irecv, peer, tensor) for peer, tensor in enumerate(into) if tensor is not None and tensor.numel()]
        for step in range(1, self.size):  # every rank begins with another peer
            tensor = sends[peer := (self.rank + step) % self.size]
            if tensor is not None and tensor.numel():
                todo.append((dist.isend, peer, tensor))
        if self.backend == "nccl":
            moves = [dist.P2POp(op, as_bytes(tensor), group=self.group, group_peer=peer) for op, peer, tensor in todo]
            return self._try(ticket.kind, lambda: dist.batch_isend_irecv(moves)) if moves else []
        return self._try(ticket.kind, lambda: [
            op(as_bytes(tensor), group=self.group, tag=tag_of(ticket, half, tensor.nbytes),
               **{"group_src" if op is dist.irecv else "group_dst": peer}) for op, peer, tensor in todo])

    def run(self, ticket: Ticket, stage: Stage, line: int = 0) -> Work:
        """A work of several stages: on gloo by `fasttrain.dist.stages.Lines`, on NCCL in a stream of its own."""
        if self.backend == "nccl":
            return OnDevice(self._post(), ticket.kind, ticket.nbytes, stage, self._stream)
        work = Staged(self._post(), ticket.kind, ticket.nbytes)
        self._lines.put(work, stage, line)
        return work

    def close(self) -> None:
        """Leave the group, after every process has finished its collectives. Never call it after an error."""
        self._lines.close()
        dist.destroy_process_group(None if self._everything else self.group)

    def _post(self) -> Post:
        return Post(self.rank, self.size, self.timeout_s, self.watch, self.waits)

    def _single(self, kind: str, nbytes: int, sent: int, issue: Callable[[], Any],
                finish: Callable[[], Any] | None = None) -> Work:
        """One collective of torch; none where there is nothing to send, as among ranks that agree on that."""
        if nbytes == 0:
            return Ended(self._post(), kind)
        self.issue(kind, nbytes, sent)
        return Single(self._post(), kind, nbytes, self._try(kind, issue), finish, self.backend == "gloo")

    def _try(self, what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0]
            raise self.watch.explain() or WireError(f"{what} failed: {line}") from error


OPERATIONS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX,
              "bor": dist.ReduceOp.BOR}
# torch 2.13 calls them so and warns of the older names, which 2.11 has only.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def ranks_of(group: dist.ProcessGroup | DeviceMesh | Sequence[int] | None) -> list[int]:
    """The members of a group, by their numbers among all processes."""
    if group is None:
        return list(range(dist.get_world_size()))
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"the mesh has {group.ndim} dimensions ({group.mesh_dim_names}), and a wire runs along "
                             f"one: give mesh[name]")
        group = group.get_group()
    return dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else sorted(group)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, whatever its dtype: what gloo takes for messages."""
    return tensor.detach().view(-1).view(torch.uint8)


def tag_of(ticket: Ticket, half: int, nbytes: int) -> int:
    """The tag of a message: of 31 bits, as gloo takes."""
    return zlib.crc32(f"{ticket.number} {ticket.kind} {half} {nbytes}".encode()) & 0x7FFFFFFF
