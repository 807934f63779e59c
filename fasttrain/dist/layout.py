"""Where every gradient lies: entries of a model in flat buckets, and buckets cut into equal shards.

Pure functions of their arguments: every rank computes the same layout by itself, and `digest` proves it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fasttrain.dist import cutting, sizes
from fasttrain.dist.slots import Bucket, Entry, MiB, Options, Piece, Slot, dtype_name, ordinals

__all__ = ["Bucket", "Entry", "FlatLayout", "Options", "Piece", "Slot"]

FORMAT = 1


@dataclass(frozen=True)
class FlatLayout:
    """Entries in flat buckets. Make it with `of` or `plan`; equal arguments give equal layouts, on every machine.

    Attributes:
        entries: as they were given.
        order: the names with a gradient, in the order in which their gradients are expected.
        worlds: (group, ranks in it), by name.
        options: how it was cut.
        buckets: in the order of launching: that in which their last gradients are expected.

    Example:
        >>> import torch
        >>> layout = FlatLayout.of([Entry("weight", (300, 4), torch.float32), Entry("bias", (300,), torch.float32)], 2)
        >>> layout.slot("weight")
        Slot(name='weight', bucket=0, start=512, numel=1200, index=0)
        >>> layout.owned(1)
        [Piece(name='weight', bucket=0, first=512, numel=688, offset=0)]
        >>> print(layout.table())
        bucket  group x ranks  dtype    device  slots  elements  shard  bytes  padding
             0  data x 2       float32  cpu         2     2,048  1,024  8,192    26.8%
         total                                      2     2,048         8,192    26.8%
    """

    entries: tuple[Entry, ...]
    order: tuple[str, ...]
    worlds: tuple[tuple[str, int], ...]
    options: Options
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, entries: Iterable[Entry], world: int | Mapping[str, int], *, order: Sequence[str] | None = None,
           bucket_bytes: int | Sequence[int] = 25 * MiB, first_bucket_bytes: int = MiB, align_bytes: int = 128,
           block: int = 256, bucket_dtype: torch.dtype | None = None,
           wire_dtype: torch.dtype | None = None) -> FlatLayout:
        """Lay out entries: one chain of buckets for each (dtype, device, group).

        An entry is never divided over buckets; one that is larger than a bucket gets a bucket of its own. Shards cut a
        bucket anywhere, at a multiple of its unit: the least that is whole in `align_bytes` and in `block`, at which
        every slot starts too. So a cut never divides a block of an entry. An entry of no elements has a slot of none.

        Arguments:
            entries: in the order of registration, each name once.
            world: ranks in the group "data"; or for each group by its name.
            order: the names of all entries with a gradient, in the order in which these are expected; None: the reverse
                of registration.
            bucket_bytes: what a bucket holds at most, before it is padded to equal shards. A sequence: of the second,
                third, ... bucket of each chain, the last for all that follow.
            first_bucket_bytes: of the first of each chain: small, so that communication begins early.
            align_bytes: for the accesses of kernels and collectives, in the bucket and on the wire.
            block: elements of the largest block in which an optimizer's state is kept.
            bucket_dtype: of all buckets; None: each entry's own. float32 for the gradients of a bfloat16 model.
            wire_dtype: in which the buckets travel, if in another: here it counts for alignment only.

        Raises:
            ValueError: a name twice, a group without a world, a size below one, an order that is no permutation.
            TypeError: a size that is no integer, a dtype that buckets cannot have.
        """
        options = Options(bucket_bytes, first_bucket_bytes, align_bytes, block, bucket_dtype, wire_dtype)
        entries, worlds = tuple(entries), cutting.worlds_of(world)
        expected = cutting.expected(entries, worlds, order)
        names = tuple(entry.name for _, entry in expected)
        return cls(entries, names, tuple(worlds.items()), options, cutting.buckets(expected, worlds, options))

    @classmethod
    def plan(cls, entries: Iterable[Entry], world: int | Mapping[str, int], bandwidth_bytes_per_s: float,
             latency_s: float, backward_s: float | Sequence[float] | None = None, *,
             order: Sequence[str] | None = None, **options: Any) -> FlatLayout:
        """Lay out entries in buckets of the sizes with which the last all-reduce should end first.

        A bucket of n bytes is all-reduced by W ranks in t(n) = 2 (W - 1) (latency + n / (W bandwidth)), one after the
        other: start(i) = max(ready(i), end(i - 1)), end(i) = start(i) + t(n(i)), where ready(i) is when its last gradient
        is there. Of all powers of two from 64 KiB on, for the first bucket and for the others, those with the least
        end are taken; within 0.2% of it those with the fewest buckets. Too small buckets pay the latency, too large ones
        begin late, and the last is never hidden.

        Without `backward_s` nothing is known of ready(i): the others get 15 W bandwidth latency bytes, at which latency
        is 1/16 of t(n), and the first W bandwidth latency, at which it is half (Hockney's n_1/2); 64 KiB at least.

        Arguments:
            bandwidth_bytes_per_s: that a rank sends while it receives as much.
            latency_s: of a message of no bytes.
            backward_s: seconds of backward without communication, in which gradients arrive by their elements; or the
                seconds after its beginning at which each is there, in the layout's order.
            entries, world, order, options: as of `of`, but for the sizes of buckets.

        Raises:
            ValueError, TypeError: as `of`; a bandwidth, latency or time that cannot be.

        Sources:
            The formulas and their references stand in `fasttrain.dist.accounting`; the tradeoff in S. Li et al., "PyTorch
            Distributed: Experiences on Accelerating Data Parallel Training", arXiv:2006.15704, sections 3.2.2 and 3.2.3.

        Example:
            >>> import torch
            >>> entries = [Entry(f"{layer}", (1024, 1024), torch.float32) for layer in range(100)]
            >>> for backward_s in (None, 0.5, 0.05):
            ...     made = FlatLayout.plan(entries, 8, 1e9, 1e-4, backward_s)
            ...     print(made.options.first_bucket_bytes, made.options.bucket_bytes, len(made.buckets))
            800000 12000000 51
            16777216 33554432 13
            33554432 536870912 2
        """
        entries, worlds, given = tuple(entries), cutting.worlds_of(world), Options(**options)
        expected = cutting.expected(entries, worlds, order)
        chosen = sizes.plan(expected, worlds, given, bandwidth_bytes_per_s, latency_s, backward_s)
        return cls.of(entries, worlds, order=order, **vars(chosen))

    # --- Looking up ---------------------------------------------------------------------------------------------------

    def slot(self, name: str) -> Slot:
        """The place of an entry. Raises KeyError if the layout has no such entry, or it has no gradient."""
        try:
            return self._slots[name]
        except KeyError:
            frozen = any(entry.name == name for entry in self.entries)
            raise KeyError(f"{name!r} has no slot: " + ("it requires no gradient" if frozen else
                                                        "the layout has no such entry")) from None

    def owned(self, rank: int, group: str = "data") -> list[Piece]:
        """What a rank of a group owns: the interval of each entry, by bucket and offset.

        The ranks of a group together own every element with a gradient once. An entry of no elements is owned by the rank
        in whose shard it starts, as a piece of none, so that every entry has an owner.
        """
        known = dict(self.worlds)
        if group not in known:
            raise ValueError(f"there is no group {group!r}: the layout has {', '.join(known)}")
        if not 0 <= rank < known[group]:
            raise ValueError(f"rank {rank} is not in the group {group!r} of {known[group]}")
        return [piece for bucket in self.buckets if bucket.group == group for piece in cutting.pieces(bucket, rank)]

    @cached_property
    def _slots(self) -> dict[str, Slot]:
        return {slot.name: slot for bucket in self.buckets for slot in bucket.slots}

    # --- Showing and keeping ------------------------------------------------------------------------------------------

    def table(self, slots: bool = False) -> str:
        """One line for each bucket, and for each slot if wanted; the padding is what is no element of an entry."""
        lines = [("bucket", "group x ranks", "dtype", "device", "slots", "elements", "shard", "bytes", "padding")]
        total, used, size = (sum(getattr(bucket, what) for bucket in self.buckets) for what in ("elements", "used", "bytes"))
        for bucket in self.buckets:
            lines.append((f"{bucket.index}", f"{bucket.group} x {bucket.world}", dtype_name(bucket.dtype), bucket.device,
                          f"{len(bucket.slots):,}", f"{bucket.elements:,}", f"{bucket.shard:,}", f"{bucket.bytes:,}",
                          f"{1 - bucket.used / bucket.elements:.1%}"))
            for slot in bucket.slots if slots else ():
                lines.append(("", f"  {slot.name}", "", "", f"{slot.index}", f"{slot.numel:,}", "", f"from {slot.start:,}",
                              ""))
        lines.append(("total", "", "", "", f"{len(self.order):,}", f"{total:,}", "", f"{size:,}",
                      f"{1 - used / total:.1%}" if total else ""))
        wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (1, 2, 3)  # columns of words
        return "\n".join("  ".join(cell.ljust(width) if place in left else cell.rjust(width)
                                   for place, (cell, width) in enumerate(zip(line, wide, strict=True))).rstrip()
                         for line in lines)

    def to_json(self) -> str:
        """The layout as canonical JSON: equal layouts give equal text."""
        return canonical(self._plain(str))

    @classmethod
    def from_json(cls, text: str) -> FlatLayout:
        """The layout that `to_json` wrote.

        Raises:
            ValueError: the text is none, of another format, or does not describe the layout that its own entries and
                options give (it was changed, or another version of this package cuts otherwise).
        """
        try:
            kept = json.loads(text)
            version = kept["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"this is no layout written by to_json: {error}") from error
        if version != FORMAT:
            raise ValueError(f"the layout has the format {version!r}, and this version of fasttrain reads {FORMAT}: lay the "
                             "entries out again, or use the version that wrote it")
        try:
            entries = [Entry(**{**entry, "dtype": _dtype(entry["dtype"])}) for entry in kept["entries"]]
            options: dict[str, Any] = {name: _dtype(value) if name.endswith("dtype") else value
                                       for name, value in kept["options"].items()}
            made = cls.of(entries, kept["worlds"], order=kept["order"], **options)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is no layout written by to_json: {error}") from error
        if made.to_json() != canonical(kept):
            raise ValueError("the buckets of this layout are not those that its entries and options give: the text was "
                             "changed, or another version of fasttrain wrote it; lay the entries out again")
        return made

    def digest(self) -> str:
        """64 hexadecimal digits that stand for the layout, the same in every process.

        Devices are counted as they occur ("cuda:0", "cuda:1"): which GPU of its machine a rank uses is its own affair.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(canonical(self.portable()).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def portable(self) -> dict[str, Any]:
        """What `digest` is made of, as plain data."""
        return self._plain(ordinals(self.entries).__getitem__)

    def _plain(self, device: Any) -> dict[str, Any]:
        """As JSON has it; `device` renames devices."""
        entries = [{**vars(entry), "dtype": dtype_name(entry.dtype), "device": device(entry.device)}
                   for entry in self.entries]
        options = {name: dtype_name(value) if isinstance(value, torch.dtype) else value
                   for name, value in vars(self.options).items()}
        buckets = [[bucket.elements, [[slot.index, slot.start] for slot in bucket.slots]] for bucket in self.buckets]
        return {"format": FORMAT, "entries": entries, "order": self.order, "worlds": dict(self.worlds),
                "options": options, "buckets": buckets}


def canonical(plain: Any) -> str:
    """JSON with sorted keys and without spaces: equal data, equal text."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name)
    if found is not None and not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return found
