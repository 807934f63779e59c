"""Gradients that lie elsewhere than at the step before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Gradients:
    """The gradients of some items: where they lie, which is all that tables of addresses take; and they themselves.

    Attributes:
        addresses: int64, one for each item.
        tensors: reads them from their parameters.
    """

    addresses: np.ndarray
    tensors: Callable[[], Sequence[Tensor]]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Gradients:
        return Gradients(np.array([tensor.data_ptr() for tensor in tensors], np.int64), lambda: tensors)

    def take(self, places: Sequence[int]) -> Gradients:
        """Those of some of the items."""
        def taken() -> list[Tensor]:
            own = self.tensors()
            return [own[place] for place in places]
        return Gradients(self.addresses[np.asarray(places, np.int64)], taken)

    def but(self, others: Sequence[Tensor | None]) -> Gradients:
        """With other tensors in the place of some, where not None."""
        given = {place: other for place, other in enumerate(others) if other is not None}
        addresses = self.addresses.copy()
        addresses[list(given)] = [other.data_ptr() for other in given.values()]
        return Gradients(addresses, lambda: [given.get(place, own) for place, own in enumerate(self.tensors())])
