"""Coefficients by themselves: numbers that a device computes from its step counts, where no element needs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import prologue, ring
from fasttrain.kernels.place import Place
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.reference_driven import numbers_of
from fasttrain.kernels.trace_scalars import trace_scalars
from fasttrain.rule import Rule


class Scalars:
    """The coefficients of some rows of one rule, made by Triton; or naively on the host, by the reference.

    Arguments:
        rows: of one structure; what they name is on `device`, or a float.
        backend: "reference" for the naive way.

    Example:
        >>> import torch
        >>> rule = Rule("Decay", (), lambda step, lr: {"rate": lr / step}, lambda p, g, k: p - k.rate * g)
        >>> made = torch.tensor(3.0)
        >>> Scalars(rule, [Row(dict(lr=2.0), counter=made)], torch.device("cpu"), "reference").launch()
        tensor([[0.5000]], dtype=torch.float64)
    """

    def __init__(self, rule: Rule, rows: Sequence[Row], device: torch.device, backend: str) -> None:
        self.rule, self.rows, self.device, self.naive = rule, list(rows), device, backend == "reference"
        if self.naive:
            return
        self.graph = trace_scalars(rule, rows[0].hyperparameters)
        self.seen = prologue.words(self.graph, rows, device)
        self.words = self._sent()
        self.out = torch.zeros(len(rows), prologue.width(self.graph, False), dtype=torch.float64, device=device)
        self.skip = torch.zeros(len(rows), dtype=torch.int32, device=device)

    def refresh(self, rows: Sequence[Row]) -> None:
        """Take the numbers of other rows of the same structure; sent where they differ, and never in a capture."""
        self.rows = list(rows)
        if self.naive:
            return
        words = prologue.words(self.graph, rows, self.device)
        if words.tobytes() != self.seen.tobytes():
            self.seen = words
            if self.device.type == "cpu":
                self.words.copy_(torch.from_numpy(words))
            else:
                ring.ring_of(Place(self.device)).send(words.reshape(-1).view(np.uint8), self.words.view(-1).view(
                    torch.uint8))

    def _sent(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.from_numpy(self.seen.copy())
        return ring.upload(Place(self.device), self.seen).view(torch.int64).view(self.seen.shape)

    def launch(self) -> Tensor:
        """Make them: float64 of shape (rows, coefficients in the order of the rule), at one address for good."""
        if self.naive:
            return torch.tensor([numbers_of(self.rule, row, True)[1:] for row in self.rows], dtype=torch.float64,
                                device=self.device)
        prologue.run(self.graph, self.words, self.out, self.skip, False)
        return self.out[:, 1:]
