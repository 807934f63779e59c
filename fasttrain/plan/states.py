"""Bytes of parameters, gradients and optimizer states, from the code that keeps them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fasttrain import optim
from fasttrain.dist.layout import Entry, FlatLayout
from fasttrain.optim.part import Part, declare
from fasttrain.plan.job import PRECISIONS, Job, Way
from fasttrain.plan.tensors import Held, Stage
from fasttrain.precision.codecs import code_dtype, codec
from fasttrain.precision.storage import PRESETS, is_plain, preset
from fasttrain.train.config import BadInput

DTYPES = {4: torch.float32, 2: torch.bfloat16}
STEP = 4  # bytes of a parameter's step count, as torch keeps it
ROTATING = 4  # buckets that stage 2 of ZeRO has in memory: the default of fasttrain.parallel.Zero


class Kept(NamedTuple):
    """Bytes on one rank.

    Attributes:
        weights: of parameters, as they lie between steps.
        gradients: after backward, and where they are added up; buckets are gradients.
        states: of the optimizer.
        gathered: of parameters and gradients of which ZeRO's stage 3 has the whole for a while: of the two largest
            blocks one after the other, and the gradient of one.
    """

    weights: int
    gradients: int
    states: int
    gathered: int = 0


def kept(here: Stage, job: Job, way: Way) -> Kept:
    """What a rank keeps of its parameters and of all that belongs to them."""
    return _kept(here, job, way.zero, way.shard, way.terms, way.expert)


@functools.lru_cache(None)
def _kept(here: Stage, job: Job, zero: int, shard: int, terms: int, expert: int) -> Kept:
    if zero == 3 and shard > 1:
        return _sharded(here.held, job, shard)
    if zero in (1, 2) and terms > 1:
        return _divided(here, job, zero, terms, expert)
    if terms == 1 and job.grad == job.param:  # nothing to average: gradients stay where autograd puts them
        gradients = here.elements * job.grad
    else:
        gradients = sum(bucket.bytes for bucket in buckets(here, job, terms, expert).buckets)
    return Kept(here.elements * job.param, gradients, sum(states(one.shape, one.numel, job) for one in here.held))


@functools.lru_cache(None)
def buckets(here: Stage, job: Job, terms: int, expert: int = 1) -> FlatLayout:
    """The buckets in which the gradients of a rank travel, exactly as `Reducer` lays them out.

    Arguments:
        terms: ranks over which gradients are averaged, those that have other experts among them.
        expert: of them, the ranks that have different experts.
    """
    entries = [Entry(one.name, one.shape, DTYPES[job.param], group="expert" if one.expert else "data")
               for one in here.held]
    return FlatLayout.of(entries, {"data": terms, "expert": terms // expert}, bucket_bytes=job.bucket_bytes,
                         first_bucket_bytes=job.first_bucket_bytes,
                         bucket_dtype=None if job.grad == job.param else DTYPES[job.grad])


def _divided(here: Stage, job: Job, zero: int, terms: int, expert: int) -> Kept:
    """Stages 1 and 2: parameters lie in flat memory as padded as the buckets, states are the first rank's."""
    layout = buckets(here, job, terms, expert)
    whole = {one.name: one.numel for one in here.held}
    owned = [piece for group, _ in layout.worlds for piece in layout.owned(0, group)]
    mine = sum(states((piece.numel,), whole[piece.name], job) for piece in owned)
    weights = sum(bucket.elements for bucket in layout.buckets) * job.param
    gradients = sum(bucket.bytes for bucket in layout.buckets)
    if zero == 2:
        largest = max(bucket.bytes for bucket in layout.buckets)
        shards = sum(bucket.shard for bucket in layout.buckets) * job.grad
        gradients = shards + min(ROTATING, len(layout.buckets)) * largest
    return Kept(weights, gradients, mine)


def _sharded(held: Sequence[Held], job: Job, shard: int) -> Kept:
    """Stage 3: `fully_shard` cuts dimension 0 of each parameter; the first rank has no smaller part than others."""
    cut = [one._replace(shape=(-(-one.shape[0] // shard), *one.shape[1:])) for one in held]
    elements = sum(one.numel for one in cut)
    blocks: dict[str, int] = {}
    for one in held:
        unit = ".".join(one.name.split(".")[:2]) if one.name.startswith("blocks.") else "rest"
        blocks[unit] = blocks.get(unit, 0) + one.numel
    largest = sorted(blocks.values(), reverse=True)
    gathered = sum(largest[:2]) * job.param + largest[0] * job.grad
    kept_states = sum(states(one.shape, one.numel, job) for one in cut)
    return Kept(elements * job.param, elements * job.grad, kept_states, gathered)


@functools.lru_cache(None)
def states(shape: tuple[int, ...], whole: int, job: Job) -> int:
    """Bytes of the optimizer's states of one parameter, or of a part of one that has `whole` elements.

    Example:
        >>> from fasttrain.plan.shapes import named
        >>> job = Job(named("gpt2"), 1024, 8, storage="8-byte")
        >>> states((4096, 256), 4096 * 256, job) / (4096 * 256)        # remainder 2, and twice a code with its unit
        4.03125...
    """
    if not math.prod(shape):
        return 0
    pattern = _pattern(job.optimizer, job.storage, job.precision)
    group = pattern.param_groups[0]
    rule = pattern.rule_of(group)
    p = torch.empty(shape, dtype=DTYPES[job.param], device="meta")
    total = STEP if pattern.counts_steps else 0
    if is_plain(group):
        return total + len(rule.state) * p.nbytes
    declare(p, Part(0, 0, whole))
    layout = pattern._layout("a parameter", p, p.dtype, group, rule)
    shapes = layout.shapes(p.shape)
    for number, *names in zip(layout.codecs, layout.keys, layout.extras, strict=True):
        for name, dtype in zip(names, (code_dtype(number), codec(number).extra), strict=True):
            if name is not None and (found := shapes[name]) is not None and dtype is not None:
                total += math.prod(found) * dtype.itemsize
    return total


def check(job: Job) -> None:
    """Raise BadInput if there is no such optimizer, or it cannot keep such parameters as the job says."""
    _pattern(job.optimizer, job.storage, job.precision)


@functools.lru_cache(None)
def _pattern(optimizer: str, storage: str, precision: str) -> Any:
    """An optimizer of a single element, for what its class and options say of any other.

    Raises:
        BadInput: there is none of that name, it is not elementwise, or it cannot keep such parameters so.
    """
    from fasttrain.train.recipe import RECIPES

    kind = getattr(optim, optimizer, None)
    if kind is None or not hasattr(kind, "rule_of"):
        raise BadInput(f"--optimizer {optimizer}: there is none of that name in fasttrain.optim")
    if storage != "plain" and storage not in PRESETS:
        raise BadInput(f"--storage {storage}: it is plain, {', '.join(PRESETS)}")
    options = {} if storage == "plain" else preset(storage)
    if options and precision != "bf16-pure":
        raise BadInput(f"--storage {storage} with --precision {precision}: parameters of fp32 are kept as they are; "
                       "use --storage plain, or --precision bf16-pure")
    p = torch.nn.Parameter(torch.zeros(1, dtype=DTYPES[PRECISIONS[precision][0]]))
    try:
        made = kind([p], **{"lr": 1e-3, **RECIPES.get(optimizer, {}), **options})
    except (TypeError, ValueError) as error:
        raise BadInput(f"--optimizer {optimizer} with --storage {storage}: {error}") from error
    if not made.takes_storage(made.param_groups[0]):
        raise BadInput(f"--optimizer {optimizer}: plans are for optimizers that step element by element, like AdamW")
    return made
