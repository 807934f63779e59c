"""Dropout whose mask depends on the seed, the step, the module's name and the place of an element, and on nothing else.

The place is that in the whole activation of the whole batch of a step, row-major, so that ranks which divide samples,
positions or features draw what a single process would, whatever the mesh and the micro-batches. A module cannot see
where its part lies: `Draws` says which step and samples are under way, and `Cut` which part of a dimension is here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fasttrain.optim.local import chunk, is_dtensor, positions
from fasttrain.parallel.building.places import AT_ONCE, AT_ONCE_ELSEWHERE
from fasttrain.parallel.building.rules import key_of
from fasttrain.parallel.wrapped import bare, clean_name, inside_of
from fasttrain.precision.draws import random_words

if TYPE_CHECKING:
    from fasttrain.dist.mesh import Mesh

MASKS = (1 << 16) + 1  # beside fasttrain.parallel.building.rules.WEIGHTS


@dataclass(frozen=True)
class Cut:
    """A dimension of activations of which this rank has a part.

    Attributes:
        dim: which; not that of samples, of which `Draws.at` tells.
        part, parts: number `part` of so many chunks, as `torch.chunk` makes them.
        whole: its size on all ranks together; None: `parts` times what is here.
        places: which indices of the whole are here, given its size, where they are no chunk: the `positions` of a
            `fasttrain.parallel.context.ContextParallel`, with its size as `parts`.

    Example:
        >>> Cut(dim=-1, part=1, parts=2).held(torch.arange(6))
        tensor([3, 4, 5])
    """

    dim: int
    part: int = 0
    parts: int = 1
    whole: int | None = None
    places: Callable[[int], Tensor] | None = None

    @classmethod
    def over(cls, mesh: Mesh, axis: str, dim: int, whole: int | None = None) -> Cut:
        """By an axis of a mesh: ``Cut.over(mesh, "tensor", -1)`` between a column- and a row-parallel layer."""
        return cls(dim, mesh.coordinates[axis], mesh.sizes[axis], whole)

    def held(self, index: Tensor) -> Tensor:
        """What is here of the indices that there are before this cut."""
        if self.places is not None:
            return index[self.places(len(index)).to(index.device)]
        return chunk(index, self.parts, self.part)


class Draws:
    """What all dropout of a model draws from: the seed, and which step and samples are under way.

    Attributes:
        seed: the same on every rank.
        step: of the run; None until `at` is called.
        sample: which of the step's samples, in the whole batch, is the first here.
    """

    def __init__(self, seed: int):
        self.seed, self.sample, self.turn, self.first = seed, 0, 0, 0
        self.step: int | None = None

    def at(self, step: int, sample: int = 0) -> None:
        """Say, before each forward pass, which step it is of, and which samples it begins with.

        Arguments:
            step: the same on all ranks.
            sample: of the step's batch, counted over all ranks and micro-batches: with b samples in a micro-batch,
                number m of this rank's a begins with ``(replica * a + m) * b``.
        """
        self.step, self.sample, self.turn, self.first = step, sample, self.turn + 1, sample

    def micro_batch(self, number: int, samples: int) -> None:
        """Go to one of the equal micro-batches, of so many samples, that begin at `at`: what a `Pipeline` calls."""
        self.sample, self.turn = self.first + number * samples, self.turn + 1

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=draws.contexts)`: recomputing
        draws what the forward pass drew, though others have been run in between, as in a pipeline."""
        return nullcontext(), self._again(self.step, self.sample)

    @contextmanager
    def _again(self, step: int | None, sample: int) -> Iterator[None]:
        before = self.step, self.sample
        self.step, self.sample = step, sample
        try:
            yield
        finally:
            self.step, self.sample = before


class Dropout(nn.Dropout):
    """Elements are zero with probability p, the others divided by 1 - p, as of `torch.nn.Dropout`.

    Activations have samples first, then what dimensions they like. Plain ones lie as `cuts` tells; those that are
    DTensors tell themselves, as parts of what `cuts` tells.

    Attributes:
        draws, name, cuts: set by `seed_dropout`.

    Raises:
        RuntimeError: there is no seed, or it is run twice in training without `Draws.at` in between: the masks would be
            the same. Recomputing in backward is meant to.
        ValueError: a cut does not fit the activation.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False):
        super().__init__(p, inplace)
        self.draws: Draws | None = None
        self.name, self.turn = "", 0
        self.cuts: Sequence[Cut] = ()

    def forward(self, input: Tensor) -> Tensor:
        """Of the shape of the input, never in place. A compiled graph breaks here: it would keep the first step's."""
        if not self.training or self.p == 0:
            return input
        run = torch.compiler.disable(self._run) if "torch._dynamo" in sys.modules else self._run
        return run(input)

    def _run(self, input: Tensor) -> Tensor:
        if input.dim() == 0:
            raise ValueError(f"dropout {self.name}: a tensor without dimensions has no samples")
        if self.draws is None or self.draws.step is None:
            raise RuntimeError(f"dropout {self.name or repr(self)} has no {'seed' if self.draws is None else 'step'}: "
                               "call draws = fasttrain.parallel.seed_dropout(model, seed) once, and draws.at(step, "
                               "sample) before each forward pass")
        if torch._C._current_graph_task_id() == -1:  # not within backward, which may recompute
            if self.turn == self.draws.turn:
                raise RuntimeError(f"dropout {self.name} is run twice at step {self.draws.step}, sample "
                                   f"{self.draws.sample}, and would have one mask: call draws.at(step, sample) before "
                                   "each forward pass, and give each place of a model a Dropout of its own")
            self.turn = self.draws.turn
        key = key_of(self.draws.seed, self.name, self.draws.step, MASKS)
        if is_dtensor(input):
            return self._of_dtensor(input, key)
        held, sizes = self.places(input.shape, input.device)
        return self._dropped(input, key, held, sizes)

    def _of_dtensor(self, x: Any, key: int) -> Any:
        held, sizes = self.places(x.shape, x.device)
        held = [index[here.to(x.device)] for index, here in zip(held, positions(x), strict=True)]
        part = self._dropped(x.to_local(), key, held, sizes)
        return type(x).from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())

    def _dropped(self, x: Tensor, key: int, held: list[Tensor], sizes: list[int]) -> Tensor:
        assert self.draws is not None
        kept = mask(key, held, sizes, self.p, x.device)
        return Masked.apply(x, kept, 1 / (1 - self.p) if self.p < 1 else 0.0, (key - (1 << 63), self.draws.sample))

    def places(self, shape: Sequence[int], device: torch.device) -> tuple[list[Tensor], list[int]]:
        """(for each dimension the indices in the whole of those that are here; the sizes of the whole).

        Raises:
            ValueError: a cut does not leave as many as are here.
        """
        held, sizes = [torch.arange(size, device=device) for size in shape], list(shape)
        for dim in range(len(shape)):
            cuts = [cut for cut in self.cuts if cut.dim % len(shape) == dim]
            if not cuts:
                continue
            for cut in reversed(cuts):
                sizes[dim] = cut.whole if cut.whole is not None else sizes[dim] * cut.parts
            index = torch.arange(sizes[dim], device=device)
            for cut in cuts:
                index = cut.held(index)
            if len(index) != shape[dim]:
                raise ValueError(f"dropout {self.name}: dimension {dim} of {tuple(shape)} has {shape[dim]} here, and "
                                 f"its cuts leave {len(index)} of {sizes[dim]}: give each Cut its part, parts and, "
                                 "where parts are uneven, whole")
            held[dim] = index
        held[0] = held[0] + (self.draws.sample if self.draws is not None else 0)
        return held, sizes

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Masked(torch.autograd.Function):
    """What is kept, times a factor. It keeps a byte for each element, and what that was drawn by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, factor: float, drawn: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(kept, torch.tensor(drawn))
        ctx.factor, ctx.drawn = factor, drawn
        return (x * kept).mul_(factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, drawn = ctx.saved_tensors  # of the recomputation, if there was one
        if tuple(drawn.tolist()) != ctx.drawn:
            raise RuntimeError("a forward pass was recomputed in backward after draws.at(...) had gone on to another, "
                               "so that its dropout has other masks: give torch.utils.checkpoint.checkpoint "
                               "context_fn=draws.contexts")
        return (grad * kept).mul_(ctx.factor), None, None, None


def mask(key: int, held: Sequence[Tensor], sizes: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Whether each element is kept: bool, of the shape that is held.

    Arguments:
        held: for each dimension, the indices in the whole, on `device`.
        sizes: of the whole.
        p: of zero.
    """
    shape = torch.Size(len(index) for index in held)
    kept = torch.empty(shape, dtype=torch.bool, device=device)
    if not shape.numel():
        return kept
    if p >= 1:
        return kept.fill_(False)
    inner, outer = held[-1], torch.zeros(1, dtype=torch.int64, device=device)
    for index, size in zip(held[:-1], sizes[:-1], strict=True):
        outer = (outer[:, None] * size + index).flatten()
    outer = outer[:, None] * sizes[-1]
    least = round(p * 2**32) - (1 << 31)  # words have a sign: all are moved by half of their range
    rows, flat = max(1, AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE) // len(inner)), kept.view(-1, len(inner))
    for begin in range(0, len(outer), rows):
        words = random_words(key, outer[begin:begin + rows] + inner)
        words ^= -(1 << 31)
        torch.ge(words, min(least, (1 << 31) - 1), out=flat[begin:begin + rows])
    return kept


def seed_dropout(model: nn.Module, seed: int, cuts: Mapping[str, Sequence[Cut]] | None = None) -> Draws:
    """Let all dropout of a model draw by seed, step, name and place; `nn.Dropout` in it is replaced by `Dropout`.

    Arguments:
        model: before `tensor_parallel`, which may replace the calls of modules; changed in place.
        seed: the same on every rank.
        cuts: {pattern of module names, as of `fnmatch`: how activations there are cut}; the first that fits counts.
            Several cuts of one dimension are made one within the other, in their order.

    Returns:
        What is told the step and the samples.

    Raises:
        ValueError: dropout of another kind; a pattern that means no dropout, in a model that has some.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        >>> draws = seed_dropout(model, seed=0)
        >>> draws.at(step=0)
        >>> first = model(torch.ones(2, 4))
        >>> draws.at(step=0)
        >>> torch.equal(model(torch.ones(2, 4)), first)
        True

    Reference: Srivastava et al., Dropout, JMLR 15, 2014; counters in the place of states, Salmon et al., Parallel
    Random Numbers: As Easy as 1, 2, 3, SC 2011.
    """
    inner, draws, given = bare(model), Draws(seed), dict(cuts or {})
    inside, used, places = inside_of(inner), set[str](), []
    for path, module in inner.named_modules():
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            continue
        if not isinstance(module, nn.Dropout) or (type(module) is not Dropout and "forward" in module.__dict__):
            raise ValueError(f"{path} is {type(module).__name__}, and its call is replaced already or not that of "
                             "nn.Dropout: call seed_dropout before what changes modules, and use nn.Dropout")
        name = clean_name(path, inside)
        pattern = next((each for each in given if fnmatchcase(name, each)), None)
        used.update([] if pattern is None else [pattern])
        places.append((path, module, name, given[pattern] if pattern is not None else ()))
    if places and (idle := [pattern for pattern in given if pattern not in used]):
        raise ValueError(f"{idle[0]!r} means no dropout of this model, which has "
                         f"{', '.join(each[2] for each in places)}")
    for path, module, name, cut in places:
        new = module if isinstance(module, Dropout) else Dropout(module.p)
        new.draws, new.name, new.cuts, new.turn, new.training = draws, name, tuple(cut), 0, module.training
        around, _, last = path.rpartition(".")
        if new is not module and path:
            setattr(inner.get_submodule(around), last, new)
    return draws
