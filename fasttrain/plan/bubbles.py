"""Pipeline schedules: how long ranks wait, and of how many micro-batches they keep activations at a time.

Formulas of the schedules as torch runs them, counted from the first operation of any rank to the last of any: a step
with one norm over all ranks begins and ends together. Tests play torch's own orders of operations against them.

Sources: Huang et al., GPipe, arXiv 1811.06965; Narayanan et al., arXiv 2104.04473, section 2.2 (1F1B, interleaved); Qi
et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241, section 2 and 6 (ZB-H1, ZB-V).
"""

from __future__ import annotations

from fasttrain.parallel.pipeline import figures

SCHEDULES = {"gpipe": (1,), "1f1b": (1,), "interleaved": (2, 4), "zero-bubble": (1, 2), "zbv": (2,)}
"""Names, and stages of a rank that are tried."""


def idle(schedule: str, pipeline: int, chunks: int = 1, forward: float = 1.0, inputs: float = 1.0,
         weights: float = 1.0) -> float:
    """For how long a rank waits in a step; with as many micro-batches as `problem` asks for, however many there are.

    Arguments:
        forward, inputs, weights: times of one micro-batch on one rank, all its stages together: the forward pass, the
            gradients of inputs (what is recomputed with them), the gradients of weights.

    Example:
        >>> idle("1f1b", 4), idle("interleaved", 4, 2), idle("zero-bubble", 4), idle("zbv", 4, 2)
        (9.0, 4.5, 3.0, 1.5)
    """
    waits = {"gpipe": forward + inputs + weights, "1f1b": forward + inputs + weights,
             "interleaved": (forward + inputs + weights) / chunks,
             "zero-bubble": max(0.0, forward + inputs - weights) / chunks, "zbv": max(forward, inputs) / chunks}
    return (pipeline - 1) * waits[schedule]


def fraction(schedule: str, pipeline: int, micro_batches: int, chunks: int = 1, forward: float = 1.0,
             inputs: float = 1.0, weights: float = 1.0) -> float:
    """The share of a step's time in which a rank waits.

    Example:
        >>> fraction("1f1b", 4, 8) == (4 - 1) / (8 + 4 - 1)
        True
    """
    waits = idle(schedule, pipeline, chunks, forward, inputs, weights)
    return waits / (waits + micro_batches * (forward + inputs + weights))


def live(schedule: str, pipeline: int, rank: int, micro_batches: int, chunks: int = 1) -> float:
    """Of how many micro-batches a rank keeps the activations at most; a part of one is what one of its stages keeps.

    It is the count of `fasttrain.parallel.pipeline.figures`: until the gradients of weights are there.

    Example:
        >>> [live("1f1b", 4, rank, 8) for rank in range(4)], live("interleaved", 4, 0, 8, 2)
        ([4.0, 3.0, 2.0, 1.0], 5.5)
    """
    return figures.live(schedule, rank, pipeline, micro_batches, chunks) / chunks if pipeline > 1 else 1


def live_head(schedule: str, pipeline: int, micro_batches: int) -> int:
    """Of how many micro-batches the last rank keeps the logits: one where backward follows forward at once."""
    if pipeline == 1 or schedule in ("1f1b", "interleaved"):
        return 1
    return micro_batches if schedule == "gpipe" else min(micro_batches, pipeline)


def problem(schedule: str, pipeline: int, micro_batches: int) -> str | None:
    """What keeps torch's schedule from running so, or its formula from being right; None if nothing does."""
    if schedule == "1f1b" and micro_batches < pipeline:
        return f"1f1b of {pipeline} stages needs as many micro-batches, and a rank has {micro_batches}"
    if schedule in ("interleaved", "zero-bubble"):
        rounds = max(1, micro_batches // pipeline)
        if micro_batches < pipeline or micro_batches % rounds:
            return (f"{schedule} over {pipeline} ranks takes micro-batches in equal rounds of {pipeline} or more, and "
                    f"a rank has {micro_batches}")
    if schedule == "zbv" and micro_batches < 2 * pipeline - 1:
        return f"zbv over {pipeline} ranks needs {2 * pipeline - 1} micro-batches, and a rank has {micro_batches}"
    return None
