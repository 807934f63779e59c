"""A step under ZeRO: this rank's pieces are stepped, and the parameters brought to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim import clip
from fasttrain.optim.local import version
from fasttrain.parallel.reducer import Reducer
from fasttrain.parallel.zero_arrival import ByBucket, refuse
from fasttrain.parallel.zero_buckets import Memory
from fasttrain.parallel.zero_gather import Gathering
from fasttrain.parallel.zero_method import Scatter
from fasttrain.parallel.zero_pieces import Piece, give

OWN = ("params", "param_names")  # of a group: not its options


class Stepping(clip.Clipped, torch.optim.Optimizer):
    """What `Zero` does in and around a step; what it is made of is described there."""

    arriving: ByBucket | None = None
    in_shards = True  # statistics of the gradients are those of `grad_statistics`: no parameter has its own

    inner: Any
    reducer: Reducer
    method: Scatter
    _pattern: Any  # the optimizer of the whole parameters, without memory; None if it is none of this package
    _pieces: list[Piece]
    _memories: list[Memory]
    _names: dict[Tensor, str]
    _stochastic: list[bool]  # of each group, whether a parameter in it takes random draws
    _gathering: Gathering
    _versions: dict[Tensor, int]  # of the parameters, after our last write
    _swapped: bool = False  # the parameters are their EMA
    _scaled: tuple[Tensor, Tensor, Tensor, float | None] | None = None
    _consolidated: dict[str, Any] | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step this rank's pieces, and bring the parameters to all ranks. A collective, as backward is.

        Raises:
            RuntimeError: parameters were moved since construction, or a piece cannot be stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    # --- Norm and loss scale ------------------------------------------------------------------------------------------

    def grad_statistics(self) -> tuple[Tensor, Tensor]:
        """As `fasttrain.optim.Optimizer.grad_statistics`: over all ranks, measured as the gradients arrived."""
        refuse(self, "anything that all ranks divide by or skip for")
        if not self.method.holding:
            self.reducer.finish()
        return self.reducer.statistics()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False,
                        norm: Tensor | None = None) -> Tensor:
        """Scale the gradients of the next step so that their norm over all ranks is at most `max_norm`.

        Returns:
            The norm before, float32 of shape (), the same on every rank.

        Raises:
            ValueError: another norm than 2, or `max_norm` is negative.
            RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        """
        return clip.clip_grad_norm([self], max_norm, norm_type, error_if_nonfinite, norm)

    def step_scaled(self, scale: Tensor, found: Tensor, norm: Tensor, max_norm: float | None = None) -> None:
        """As `fasttrain.optim.Optimizer.step_scaled`: what `fasttrain.LossScaler.step` calls."""
        if self._pattern is None:
            raise TypeError(f"LossScaler steps optimizers of this package, and this Zero has a "
                            f"{type(self.inner).__name__}: take the class of that name from fasttrain.optim")
        refuse(self, "a loss scale, a number of items or a norm")
        self._scaled = scale, found, norm, max_norm
        try:
            self.step()
        finally:
            self._scaled = None

    def step_on_arrival(self) -> ByBucket:
        """Step this rank's pieces of a bucket as soon as its reduction is over, within backward, while others are sent.

        The bits are those of the ordinary step. `step` still ends a step: it brings the parameters to all ranks. Each
        synchronised backward pass is a step of its own then: accumulate under `no_sync`. Nothing that needs all
        gradients first goes with it: a norm to clip to, a loss scale, a number of items, skipping what is not finite.

        Returns:
            What `remove()` ends it with.

        Raises:
            RuntimeError: it is on already.
            TypeError: the inner optimizer is none of this package, or keeps its states on the host (`offload`).

        Example:
            >>> optimizer = Zero(model, AdamW, stage=2, lr=1e-3)                        # doctest: +SKIP
            >>> arrival = optimizer.step_on_arrival()                                   # doctest: +SKIP
        """
        if self.arriving is not None:
            raise RuntimeError("buckets are stepped on arrival already: remove() that first")
        if self._pattern is None or self.inner.offload:
            raise TypeError(f"{type(self.inner).__name__}{' with offload' if self._pattern is not None else ''} steps "
                            "all parameters at once: step_on_arrival() takes an optimizer of fasttrain.optim")
        self.arriving = ByBucket(self)
        return self.arriving

    # --- Parameters and their averages --------------------------------------------------------------------------------

    def gather(self) -> None:
        """Wait until all parameters are there: with `overlap`, before something else than forward reads them."""
        self._gathering.wait()

    def train(self) -> None:
        """Of schedule-free optimizers: put the parameters where gradients are taken, on every rank."""
        self._whole_model("train")

    def eval(self) -> None:
        """Of schedule-free optimizers: put the averages into the parameters, on every rank."""
        self._whole_model("eval")

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """A context in which the parameters hold their EMA; every rank enters it. Afterwards they are as before.

        Raises:
            RuntimeError: as `fasttrain.optim.Optimizer.ema_weights`.
        """
        if self._swapped:
            raise RuntimeError("the parameters are their EMA already: ema_weights() is inside another")
        self.gather()
        with torch.no_grad():
            before = [piece.param.detach().clone() for piece in self._pieces]
        with self.inner.ema_weights():
            averages = [piece.param.detach().clone() for piece in self._pieces]
        self._exchange(averages)
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            self._exchange(before)

    # --- The step -----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def _step(self) -> None:
        self.before_pieces()
        self._give()
        if self._pattern is None:
            grads = [piece.param.grad for piece in self._pieces if piece.param.grad is not None]
            if (coefficient := self._clip) != 1.0 and grads:
                torch._foreach_mul_(grads, coefficient)
            self.inner.step()
        else:
            self.inner._coefficient, self.inner._limit = self._coefficient, self._limit
            self.inner._syncs = self._syncs
            if self._scaled is None:
                self.inner.step()
            else:
                self.inner.step_scaled(*self._scaled)
        self._clip, self._syncs, self._consolidated = 1.0, 0, None
        if self.arriving is not None:
            self.arriving.stepped.clear()
        for piece in self._pieces:
            piece.param.grad = None
        self.method.drop()
        self._pull()
        if self._pattern is None or not self.inner.last_step.skipped:
            self._share()

    def before_pieces(self) -> None:
        """The first piece of a step is about to be stepped: all is where it is expected."""
        if self._swapped:
            raise RuntimeError("the parameters are their EMA (ema_weights): step after the `with` block")
        self.gather()
        self._check_here()
        self._push()
        self._notice_writes()

    def give(self, piece: Piece) -> None:
        """Let a piece have its gradient."""
        grad = piece.grad_in(self.method.shard(piece.bucket))
        give(piece, grad if self._pattern is not None else grad.to(piece.param.dtype))

    def wrote(self, params: Iterable[Tensor]) -> None:
        """This rank's pieces of these parameters were stepped before the others."""
        params = list(params)
        torch.autograd.graph.increment_version(params)
        self._versions.update((p, version(p)) for p in params)

    def _give(self) -> None:
        """Let the pieces have the gradients that came since the last step."""
        used = dict(zip(self.reducer.params, self.method.used, strict=True)) if self.method.holding else {}
        for index, stochastic in enumerate(self._stochastic):
            if stochastic and any(used.get(p) for p in self.param_groups[index]["params"]):
                self.inner.param_groups[index].setdefault("draws", 0)  # also where this rank has none of them
        done = self.arriving.stepped if self.arriving is not None else ()
        for piece in self._pieces:
            if used.get(piece.whole) and id(piece) not in done:
                self.give(piece)

    def _share(self) -> None:
        """The pieces were written: bring them to all."""
        self._gathering.start()
        torch.autograd.graph.increment_version(self.reducer.params)
        self._remember()

    def _whole_model(self, mode: str) -> None:
        self.gather()
        self._notice_writes()
        self._push()
        getattr(self.inner, mode)()
        self._pull()
        self._share()
        self.gather()

    def _exchange(self, values: Iterable[Tensor]) -> None:
        """Put values into the pieces, and bring them to all, unnoticed: version counters stay."""
        for piece, value in zip(self._pieces, values, strict=True):
            piece.param.data.copy_(value)
        self._gathering.start()
        self.gather()

    def _push(self) -> None:
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update((key, value) for key, value in group.items() if key not in OWN)

    def _pull(self) -> None:
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update((key, value) for key, value in own.items() if key not in OWN)

    # --- What was written or moved outside ----------------------------------------------------------------------------

    def _remember(self) -> None:
        self._versions = {p: version(p) for p in self.reducer.params}

    def _notice_writes(self) -> None:
        """A parameter that was written since the last step: its piece was."""
        written = [piece.param for piece in self._pieces if version(piece.whole) != self._versions[piece.whole]]
        if written:
            torch.autograd.graph.increment_version(written)
        self._remember()

    def _check_here(self) -> None:
        if moved := [self._names[p] for memory in self._memories for p in memory.moved()]:
            raise RuntimeError(f"{', '.join(moved[:8])} {'is' if len(moved) == 1 else 'are'} no longer in the memory "
                               "that Zero steps: the model was moved or cast, or `p.data` assigned. Move it before it "
                               "is wrapped, and write to parameters in place (p.copy_)")
