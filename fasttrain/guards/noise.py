"""What gradients and updates say about batch size and learning rate: measured where it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.guards.later import Arrived, Later


def square_norm(tensors: Iterable[Tensor | None]) -> Tensor:
    """The sum of squares of all elements, float64 of shape (), on their device; nothing is read on the host."""
    found = [one.detach() for one in tensors if one is not None]
    if not found:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(found)).double().square().sum()


class GradientSquares:
    """The sum of squares of what a backward pass adds to the gradients, before anything is added or averaged.

    That of a micro-batch, or in data parallel of this rank alone: the small batch of a `NoiseScale`. It costs one more
    read of each gradient inside `measure`, and nothing outside of it.

    Arguments:
        params: the module, or its parameters.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> squares = GradientSquares([weight])
        >>> for _ in range(2):                             # two micro-batches, whose gradients add up
        ...     with squares.measure():
        ...         weight.square().sum().div(2).backward()
        >>> squares.take().item(), square_norm([weight.grad]).item()
        (25.0, 100.0)
    """

    def __init__(self, params: nn.Module | Iterable[Tensor]):
        given = params.parameters() if isinstance(params, nn.Module) else params
        self._params = [p for p in given if p.requires_grad]
        self._squares: list[Tensor] = []
        self._passes = 0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Around a backward pass, or one for each of several."""
        hooks = [p.register_hook(lambda grad: self._squares.append(_norm(grad))) for p in self._params]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._passes += 1

    def take(self) -> Tensor:
        """The mean over the passes measured since the last call: float64 of shape (), on the device.

        Raises:
            RuntimeError: none was.
        """
        if not self._passes:
            raise RuntimeError("no backward pass was measured: call it inside `with squares.measure():`")
        total = square_norm([]) if not self._squares else torch.stack(self._squares).double().square().sum()
        passes, self._squares, self._passes = self._passes, [], 0
        return total / passes


class NoiseDecision(NamedTuple):
    """Attributes:
        noise_scale: the batch size, in the unit of `small` and `big`, at which noise and signal are alike: well below
            it a larger batch is nearly free, well above it hardly helps. NaN while the signal is not positive.
        signal: the estimate of the squared norm of the true gradient.
        noise: the estimate of the trace of the covariance of a single sample's gradient.
    """

    noise_scale: float
    signal: float
    noise: float


class NoiseScale:
    """The gradient noise scale, from squared norms of gradients of two batch sizes.

    McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, appendix A.1: |G|^2 and S are
    estimated without bias from a small and a large batch, each is averaged over steps, and the scale is their ratio.

    Arguments:
        small: samples of the small batch: of one micro-batch, or of one process.
        big: samples of the large one, of which the small one is a part: of the whole step.
        decay: of the averages over the calls of `update`.

    Raises:
        ValueError: the batches are not of two sizes.

    Example:
        >>> noise = NoiseScale(small=8, big=64, decay=0.0)
        >>> noise.update(small_square=3.0, big_square=1.25)      # of |G|^2 = 1 and S = 16
        NoiseDecision(noise_scale=16.0, signal=1.0, noise=16.0)
    """

    def __init__(self, small: int, big: int, decay: float = 0.95):
        if not 0 < small < big:
            raise ValueError(f"small={small!r} and big={big!r} must be two sizes of batches, the first smaller")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay!r} must be in [0, 1)")
        self.small, self.big, self.decay = small, big, decay
        self._signal = self._noise = self._weight = 0.0

    def update(self, small_square: float, big_square: float) -> NoiseDecision:
        """Take the squared norms of one step, numbers of the host.

        Arguments:
            small_square: of the gradient of a small batch; of several, the mean of theirs, which is less noisy.
            big_square: of the gradient of the large one. Both are means over their samples.
        """
        if math.isfinite(small_square) and math.isfinite(big_square):
            signal = (self.big * big_square - self.small * small_square) / (self.big - self.small)
            noise = (small_square - big_square) / (1 / self.small - 1 / self.big)
            keep = self.decay
            self._signal = keep * self._signal + (1 - keep) * signal
            self._noise = keep * self._noise + (1 - keep) * noise
            self._weight = keep * self._weight + (1 - keep)
        return self.now()

    def now(self) -> NoiseDecision:
        """The estimate so far."""
        if not self._weight:
            return NoiseDecision(math.nan, math.nan, math.nan)
        signal, noise = self._signal / self._weight, self._noise / self._weight
        return NoiseDecision(noise / signal if signal > 0 else math.nan, signal, noise)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"signal": self._signal, "noise": self._noise, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it is the state of something else; nothing was changed.
        """
        if missing := [name for name in ("signal", "noise", "weight") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}: it is not one of NoiseScale")
        self._signal, self._noise, self._weight = state["signal"], state["noise"], state["weight"]


class Ratios(NamedTuple):
    """Attributes:
        step: that was measured.
        of: by parameter, the norm of the step's change over the norm of the weight.
        lowest, highest: the names of these; about 1e-3 is usual.
    """

    step: int
    of: dict[str, float]
    lowest: str
    highest: str


class UpdateRatios:
    """Norms of updates over norms of weights, by parameter, in every `every`-th step.

    A measured step keeps a copy of the parameters and reads both once more; other steps cost nothing. The numbers are
    given in the next call, as nothing waits for the device.

    Arguments:
        named: the module, or its named parameters; those of shards (DTensor) are measured as wholes, on every rank.
        every: steps.

    Raises:
        ValueError: no parameter, or `every` is not positive.

    Example:
        >>> from fasttrain.optim import SGD
        >>> model = nn.Linear(1, 1, bias=False)
        >>> model.weight.data.fill_(2.0)
        tensor([[2.]])
        >>> optimizer, ratios = SGD(model.parameters(), lr=0.5), UpdateRatios(model, every=2)
        >>> for step in range(2):
        ...     model(torch.ones(1, 1)).sum().backward()
        ...     with ratios.measure(step):
        ...         optimizer.step()
        ...     found = ratios.update(step)
        >>> found
        Ratios(step=0, of={'weight': 0.25}, lowest='weight', highest='weight')
    """

    def __init__(self, named: nn.Module | Iterable[tuple[str, Tensor]], every: int = 100):
        given = named.named_parameters() if isinstance(named, nn.Module) else named
        self._named = [(name, p) for name, p in given if p.requires_grad]
        if not self._named or isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} must be a whole number of at least 1, and there must be parameters "
                             f"(there are {len(self._named)})")
        self.every, self._later, self._made = every, Later(), None

    _made: Tensor | None

    @contextmanager
    def measure(self, step: int) -> Iterator[None]:
        """Around the step of the optimizer; measures it if it is due."""
        if step % self.every:
            yield
            return
        with torch.no_grad():
            before = [p.detach().clone() for _, p in self._named]
        yield
        with torch.no_grad():
            rows = [torch.stack([_norm(p - old), _norm(old)]) for (_, p), old in zip(self._named, before, strict=True)]
            self._made = torch.stack([row[0] / row[1] for row in rows])

    def update(self, step: int) -> Ratios | None:
        """The ratios that were measured in the step before; None if it was not due."""
        arrived = self._later.put(step, ratios=self._made)
        self._made = None
        return None if arrived is None else self._told(arrived)

    def flush(self) -> list[Ratios]:
        """What was measured and not told yet; waits for the device."""
        return [told for arrived in self._later.flush() if (told := self._told(arrived)) is not None]

    def _told(self, arrived: Arrived) -> Ratios | None:
        numbers = arrived.values["ratios"]
        if numbers is None:
            return None
        numbers = numbers if isinstance(numbers, list) else [numbers]
        of = {name: number for (name, _), number in zip(self._named, numbers, strict=True)}
        ranked = sorted(of, key=lambda name: (math.isnan(of[name]), of[name]))
        return Ratios(arrived.step, of, ranked[0], ranked[-1])


def _norm(tensor: Any) -> Tensor:
    made = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return made.full_tensor() if hasattr(made, "full_tensor") else made
