"""Gradients in buckets are checked once for all, where somebody says that nothing touched them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from fasttrain.parallel.passes import Passes


class Vouching(Passes):
    """What `fasttrain.parallel.reducer.Reducer` tells an optimizer."""

    _vouched_for: tuple[Callable[[], Any], int, bool] = (lambda: None), 0, False  # how many, whether they are ours
    _token: Any = None

    def vouch(self, optimizer: Any) -> bool:
        """Spare an optimizer's next step the comparison of every parameter with what it was, where gradients are views
        of the buckets that they were views of before: the host's part of a step on a GPU then hardly grows with the
        number of parameters.

        By calling this you say that since the last step nothing but the values of parameters, states and gradients
        changed: nobody assigned a `p.grad`, a `p.data` or an entry of `optimizer.state`. Loading a state dict and
        adding parameters are noticed all the same.

        Arguments:
            optimizer: of this package, else nothing is said.

        Returns:
            Whether it was said; not if a parameter has no gradient in this step, if the optimizer has parameters that
            are not in these buckets, or if there are no buckets (one process). The step then compares as usual.

        Example:
            >>> loss.backward()                                                         # doctest: +SKIP
            >>> model.reducer.vouch(optimizer)                                          # doctest: +SKIP
            True
            >>> optimizer.step()                                                        # doctest: +SKIP
        """
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        known, counted, covered = self._vouched_for
        if known() is not optimizer or counted != count:
            covered = hasattr(optimizer, "vouched") and all(p in self._index for group in optimizer.param_groups
                                                            for p in group["params"])
            self._vouched_for = weakref.ref(optimizer), count, covered
        if not covered or not self._all_here or self.idle or self.method.final:
            return False
        self._token = self._token or object()  # its own, as long as an optimizer has it
        optimizer.vouched = self._token, count
        return True
