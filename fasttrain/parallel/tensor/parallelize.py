"""A model divided over the tensor axis of a mesh, by a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fasttrain.dist.mesh import AXES, Mesh
from fasttrain.optim.local import is_dtensor
from fasttrain.parallel.tensor import partial

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

STYLES = ("column", "row", "vocabulary", "sequence", "replicate")
LOSSES = ("vocabulary", "whole")


def tensor_parallel(model: nn.Module, mesh: Mesh | DeviceMesh,
                    plan: Mapping[str, str | ParallelStyle] | None = None, *, sequence: bool = False,
                    loss: str = "vocabulary") -> nn.Module:
    """Divide the layers of a model over the tensor axis, in place.

    Parameters that are cut become DTensors over ``mesh["tensor"]``, of the shape that they had, with the values of the
    axis's first rank, as all others; modules still take and return plain tensors. Every rank of the axis has the same
    inputs, calls this with the same model and plan, and makes its optimizer of the parameters afterwards.

    Arguments:
        mesh: with a "tensor" axis; without one, or with one of a single rank, nothing is done.
        plan: for patterns of module names (each part between dots matched by fnmatch, "" is the model) what to do:

            - ``"column"``: a Linear of which each rank computes some of the features that go out;
            - ``"row"``: a Linear that reads them, whose outputs are added over the ranks;
            - ``"vocabulary"``: an Embedding, or the Linear that gives logits, cut by tokens; evenly or not;
            - ``"sequence"``: a norm, a Dropout, whatever treats each position by itself, on the rank's own positions;
            - ``"replicate"``: a module that needs all positions, computed by every rank;
            - a ParallelStyle of torch, or of `fasttrain.parallel.tensor.styles`.

            Modules that are not named are left alone. None: the ready plan of the model, of fasttrain's GPT or of
            transformers' models like Llama or GPT-2, found by the names of its modules.
        sequence: between rows and columns each rank has its part of the positions, dimension 1 of activations, which
            saves their memory and sends the same bytes. In a plan of your own the activations that reach a named module
            are divided then: "vocabulary" and "replicate" embeddings divide them; and it has to say what becomes of
            every parameter: norms that it does not name would have wrong gradients.
        loss: "vocabulary": the logits leave as a DTensor placed Shard(-1), for `fasttrain.losses.cross_entropy`, so
            that no rank ever has all; "whole": as a plain tensor, for code that computes its own loss.

    Returns:
        The model.

    Raises:
        ValueError: sizes that do not divide, a pattern that means no module, parts of a plan that contradict one
            another, a style that a module cannot have, a model that is wrapped or sharded already. The same on every
            rank, and nothing is changed.

    Example:
        >>> from fasttrain.parallel import Mesh                                             # doctest: +SKIP
        >>> mesh = Mesh(tensor=2)                                                           # doctest: +SKIP
        >>> model = tensor_parallel(model, mesh, {"up": "column", "down": "row"})           # doctest: +SKIP

    Reference: Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3; sequence parallelism, Korthikanti et al., arXiv
    2205.05198, section 4.2.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r}: it is {' or '.join(map(repr, LOSSES))}")
    axis = axis_of(mesh)
    if axis is None:
        return model
    from fasttrain.parallel.tensor import checks
    from fasttrain.parallel.tensor.dropout import watch
    from fasttrain.parallel.tensor.names import resolved
    from fasttrain.parallel.tensor.ready import ready_plan

    checks.check_bare(model, axis.device_type)
    whole = loss == "whole"
    given = resolved(model, ready_plan(model, sequence, whole) if plan is None else plan, type(model).__name__)
    styles = {name: (pattern, made(name, model.get_submodule(name), wanted, sequence, whole))
              for name, (pattern, wanted) in given.items()}
    checks.check_styles(model, styles, axis.size())
    checks.check_pairs(styles)
    if sequence and plan is not None:
        checks.check_told(model, styles)
    placements = checks.check_tied(model, styles)
    place(model, axis, placements)
    share(model, {name: style for name, (_, style) in styles.items() if isinstance(given[name][1], str)})
    for name, (_, style) in styles.items():
        attach(name, model.get_submodule(name), axis, style)
    watch(model, axis)
    return model


def axis_of(mesh: Any) -> DeviceMesh | None:
    """The tensor axis, as a mesh of one dimension; None if it has one rank, or there is none.

    Raises:
        ValueError: names of other dimensions than a `Mesh` has.
    """
    if isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names or ()
        if unknown := [name for name in names or ("a dimension without a name",) if name not in AXES]:
            raise ValueError(f"the mesh has {', '.join(unknown)}: name the dimension to divide layers over \"tensor\", "
                             "init_device_mesh(device, (n,), mesh_dim_names=(\"tensor\",)), or use "
                             "fasttrain.parallel.Mesh(tensor=n)")
        axis = mesh["tensor"] if "tensor" in names else None
    elif isinstance(mesh, Mesh):
        axis = mesh["tensor"]
    else:
        raise TypeError(f"mesh is a {type(mesh).__name__}: give a fasttrain.parallel.Mesh, or a DeviceMesh of torch")
    return axis if axis is not None and axis.size() > 1 else None


def made(name: str, module: nn.Module, wanted: Any, sequence: bool, whole: bool) -> Any:
    """The ParallelStyle that a word of a plan means for a module.

    Raises:
        ValueError: there is no such word. TypeError: it is none, nor a ParallelStyle.
    """
    from torch.distributed.tensor.parallel import ParallelStyle

    from fasttrain.parallel.tensor import moves
    from fasttrain.parallel.tensor.dropout import Dropped
    from fasttrain.parallel.tensor.styles import Column, Row, Style, Whole
    from fasttrain.parallel.tensor.vocabulary import Head, Lookup

    if isinstance(wanted, ParallelStyle):
        return wanted
    if not isinstance(wanted, str):
        raise TypeError(f"the plan has {wanted!r} for {name}: give one of {', '.join(STYLES)}, or a ParallelStyle")
    if wanted not in STYLES:
        raise ValueError(f"the plan has {wanted!r} for {name}: give one of {', '.join(STYLES)}, or a ParallelStyle")
    if wanted == "column":
        return Column(moves.enter(sequence))
    if wanted == "row":
        return Row(moves.leave(sequence), sequence)
    if wanted == "vocabulary" and isinstance(module, nn.Linear):
        return Head(moves.enter(sequence), whole)
    if wanted == "vocabulary":
        return Lookup(moves.leave(sequence))
    if wanted == "replicate" and sequence:
        return Whole()
    if wanted == "sequence" and sequence and isinstance(module, nn.Dropout):
        return Dropped()
    return Style(addends=sequence and wanted == "sequence")


@torch.no_grad()
def place(model: nn.Module, axis: DeviceMesh, placements: Mapping[int, Any]) -> None:
    """Make DTensors of parameters that have a placement, one of each that modules share; bring all others, and buffers
    of numbers, to the values of the axis's first rank."""
    from fasttrain.parallel.tensor.cut import agreed, distributed

    twins: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            if id(p) not in twins:
                if id(p) in placements:
                    twins[id(p)] = distributed(p, axis, placements[id(p)])
                else:
                    twins[id(p)] = p
                    if not is_dtensor(p):  # a module that divides itself has seen to its own
                        p.copy_(agreed(p, axis))
            module._parameters[name] = twins[id(p)]
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(agreed(buffer, axis))


def share(model: nn.Module, styles: Mapping[str, Any]) -> None:
    """Let columns of one module, each with a style of its own, bring an input that they all read once."""
    from fasttrain.parallel.tensor.shared import Shared
    from fasttrain.parallel.tensor.styles import Column

    together: dict[str, list[Any]] = {}
    for name, style in styles.items():
        if isinstance(style, Column):
            together.setdefault(name.rpartition(".")[0], []).append(style)
    for around, columns in together.items():
        if len(columns) > 1:
            shared = Shared()
            model.get_submodule(around).register_forward_hook(shared.forget, always_call=True)
            for column in columns:
                column.shared = shared


def attach(name: str, module: nn.Module, axis: DeviceMesh, style: Any) -> None:
    """Let a module run in its style, once its parameters are placed, or by a style of torch, which places them."""
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    from fasttrain.parallel.tensor.styles import Style

    if isinstance(style, Style):
        style.attach(module, axis, name or type(module).__name__)
        return
    parallelize_module(module, axis, style)
    for p in module.parameters() if isinstance(style, SequenceParallel) else ():
        partial.declare(p)
