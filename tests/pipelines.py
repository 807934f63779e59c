"""What tests of pipelines share: small models, and a run of one process beside that of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW
from fasttrain.parallel.pipeline import Pipeline, split
from fasttrain.precision.loss_scale import step_divided
from fasttrain.train.model import GPT

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "breadth-first": 2, "zero-bubble": 2, "zbv": 2, "dualpipev": 2}
BOUND = 1e-10  # of float64: sums over micro-batches in another order


def gpt(tied: bool = False, layers: int = 7, dtype: torch.dtype = torch.float64) -> GPT:
    """A model in which every parameter gets a gradient: the main job's own begins with zeros."""
    torch.manual_seed(3)
    model = GPT(layers=layers, width=8, heads=2, positions=5, vocabulary=11, tied=tied).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def tokens(samples: int, step: int, positions: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step."""
    found = torch.randint(11, (samples, positions + 1), generator=torch.Generator().manual_seed(step))
    return found[:, :-1], found[:, 1:]


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Alone:
    """The same steps by one process: the witness."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] = entropy, clip: float = 0.5):
        self.model, self.loss, self.clip = model, loss, clip
        self.optimizer = AdamW(model.parameters(), lr=0.01)

    def step(self, inputs: Any, targets: Any) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Loss, norm, and gradients by all names; the optimizer has stepped."""
        loss = self.loss(self.model(inputs), targets)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in self.model.named_parameters(remove_duplicate=False)}
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        ours = step_divided(torch.ones((), dtype=torch.float64), self.optimizer.grad_statistics(), self.optimizer,
                            self.clip, None)  # its coefficient is of float32, which torch's is not
        torch.testing.assert_close(ours.double(), norm, rtol=1e-6, atol=0)
        self.optimizer.zero_grad()
        return loss.item(), norm, grads


def same(held: nn.Module, whole: nn.Module) -> None:
    """The parameters that a rank holds are those of the whole model."""
    expected = dict(whole.named_parameters(remove_duplicate=False))
    for name, p in held.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(p, expected[name], rtol=BOUND, atol=BOUND, msg=lambda text, name=name: name + text)


def steps_alike(mesh: Mesh, schedule: str, micro_batches: int, tied: bool, steps: int = 3) -> Pipeline:
    """Some steps of a pipeline beside those of one process, compared in everything."""
    alone = Alone(gpt(tied))
    stage = split(gpt(tied), mesh, schedule=schedule)
    pipeline = Pipeline(stage, mesh, entropy, micro_batches=micro_batches)
    optimizer = AdamW(stage.parameters(), lr=0.01)
    for step in range(steps):
        batch = tokens(2 * micro_batches, step)
        value = pipeline.evaluate(*batch)
        loss, norm, grads = alone.step(*batch)
        torch.testing.assert_close(value.item(), loss, rtol=BOUND, atol=BOUND)
        torch.testing.assert_close(pipeline.step(*batch).item(), loss, rtol=BOUND, atol=BOUND)
        for name, p in stage.named_parameters(remove_duplicate=False):
            torch.testing.assert_close(p.grad, grads[name], rtol=BOUND, atol=BOUND)
        torch.testing.assert_close(pipeline.update(optimizer, max_norm=0.5).double(), norm, rtol=1e-6, atol=0)
        optimizer.zero_grad()
        same(stage, alone.model)
    return pipeline
