"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from fasttrain.plan.hardware import Assumed, Device
from fasttrain.plan.job import Job
from fasttrain.plan.memory import Memory
from fasttrain.plan.planning import Planned, bubble_of
from fasttrain.plan.tensors import count

GB = 1e9


def lines(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns as wide as they need to be, numbers to the right."""
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if place in left else cell.rjust(width)
                      for place, (cell, width) in enumerate(zip(row, wide, strict=True))).rstrip() for row in rows]


def text(job: Job, gpus: int, device: Device, assumed: Assumed, found: Sequence[Planned], why: Counter[str],
         show: int) -> str:
    """The assumptions, the best ways, and all there is to say of the first."""
    shape, fit = job.shape, sum(one.fits for one in found)
    said = [
        f"{shape.name}: {count(shape):,} parameters; sizes from {shape.source}",
        f"a step: {job.batch:,} sequences of {job.sequence:,} tokens, {job.micro_batch} at a time on a rank; "
        f"{job.precision}, {job.optimizer} with storage {job.storage}, gradients of {job.grad} bytes",
        "activations: " + (
            f"counted from the operators of the main job's model, those for {job.kernels}"
            + (", but of its mixtures" if shape.experts else "") if shape.family == "ours" else
            "estimated by Korthikanti et al., arXiv 2205.05198, section 4, extended to this model")
        + ("" if job.flash or shape.family == "ours" else "; attention keeps its products"),
        *assumed.told(device), "",
        f"{len(found):,} ways over {gpus:,} GPUs, of which {fit:,} fit {device.memory / GB:.0f} GB"
        + ("" if fit else "; the smallest:")]
    chosen = found[:show] if show else found
    rows = [("", "way", "GB", "fits", "bubble", "step", "tokens/s a GPU", "of peak")]
    for number, one in enumerate(chosen, 1):
        rows.append((f"{number}", str(one.way), f"{one.bytes / GB:.1f}", "yes" if one.fits else "no",
                     f"{one.bubble:.1%}", f"{one.times.total:.3g} s",
                     f"{one.tokens / one.times.total / one.way.ranks:,.0f}", f"{one.of_peak(device):.1%}"))
    said += [*lines(rows, (1,)), ""]
    said += detail(job, chosen[0])
    if why:
        said += ["", "left out: " + "; ".join(f"{times:,} where {reason}" for reason, times in why.most_common(3))
                 + ("; and others" if len(why) > 3 else "")]
    return "\n".join(said)


def detail(job: Job, best: Planned) -> list[str]:
    """Memory, links and times of one way."""
    said = [f"the first: {best.way}; {best.way.micro_batches(job)} micro-batches on each rank"]
    rows = [("GB on a rank of pipeline place", *map(str, best.memory))]
    for field in Memory._fields:
        values = [getattr(one, field) for one in best.memory.values()]
        if any(values):
            rows.append((field, *(f"{value / GB:.3f}" for value in values)))
    rows.append(("total", *(f"{one.total / GB:.3f}" for one in best.memory.values())))
    said += ["", *lines(rows)]
    if best.links:
        rows = [("GB that the slowest rank sends in a step", "in all", "inside its node", "across nodes")]
        rows += [(link.axis, *(f"{sent / GB:.3f}" for sent in (link.sent, link.sent - link.across, link.across)))
                 for link in best.links]
        said += ["", *lines(rows)]
    times = "; ".join(f"{name} {seconds:.3g} s" for name, seconds in best.times._asdict().items() if seconds)
    said += ["", f"its step: {times}"]
    if best.way.pipeline > 1:
        said.append(f"bubble if forward pass, gradients of inputs and of weights took equal times: "
                    f"{bubble_of(best.way, job):.1%} of a step; as they are: {best.bubble:.1%}")
    return said


def as_json(job: Job, gpus: int, device: Device, assumed: Assumed, found: Sequence[Planned], why: Counter[str],
            show: int) -> str:
    """The same with all digits."""
    return json.dumps({
        "model": vars(job.shape) | {"parameters": count(job.shape)},
        "job": {key: value for key, value in vars(job).items() if key != "shape"}, "gpus": gpus, "gpu": vars(device),
        "assumed": vars(assumed), "ways": len(found), "fit": sum(one.fits for one in found), "left_out": dict(why),
        "best": [one.as_json(device) for one in (found[:show] if show else found)]})
