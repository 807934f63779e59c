"""What is done to a model block by block: recompute its activations in backward, compile it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fasttrain.parallel.shardable import blocks_of

COSTLY = frozenset({  # results that take longer to compute again than to keep
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
})


def recompute(model: nn.Module, how: str = "full", blocks: str | Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """Keep less between forward and backward pass: activations within blocks are computed again when they are needed.

    Names of parameters stay as they are. Call it before `fasttrain.parallel` wraps or divides the model, and before
    `compile_blocks`.

    Arguments:
        how: "full": of each block only its inputs are kept; "selective": the results of matrix products and of
            attention are kept too, and what is cheap is computed again; a number as text, "2": every second block is
            recomputed in full, the others keep all.
        blocks: see `fasttrain.parallel.shard`.

    Returns:
        The blocks that are recomputed.

    Raises:
        ValueError: the model has no such blocks, `how` is none of these, or a block is recomputed already. Nothing is
            changed.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, section 3; the choice of what
    to keep follows Korthikanti et al., arXiv 2205.05198, section 5.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
        >>> len(recompute(model, blocks=[model[1]]))
        1
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> [name for name, _ in model.named_parameters()][2]
        '1.0.weight'
    """
    chosen = _chosen(model, blocks)
    context: dict[str, Any] = {}
    if how == "selective":
        context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    elif how.isdecimal() and int(how) > 0:
        chosen = chosen[:: int(how)]
    elif how != "full":
        raise ValueError(f"recompute={how!r}: it is 'full', 'selective', or every how many blocks ('2')")
    if any("forward" in vars(block) for block in chosen):
        raise ValueError("a block's forward has been replaced already: recompute it once, and before anything else "
                         "replaces it")
    for block in chosen:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **context)
    return chosen


def compile_blocks(model: nn.Module, blocks: str | Sequence[nn.Module] | None = None,
                   **options: Any) -> list[nn.Module]:
    """Compile each block by itself: equal blocks share their code, and gradients arrive while backward still runs.

    Arguments:
        blocks: see `fasttrain.parallel.shard`.
        options: for `torch.compile`.

    Returns:
        The blocks.

    Raises:
        ValueError: the model has no such blocks.
    """
    chosen = _chosen(model, blocks)
    for block in chosen:
        block.compile(**options)
    return chosen


def _chosen(model: nn.Module, blocks: str | Sequence[nn.Module] | None) -> list[nn.Module]:
    chosen = blocks_of(model, blocks)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no ModuleList whose elements could be its blocks: give them by "
                         "name or as modules")
    return chosen


def _policy(context: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
