"""How the model lies on the processes, by `--zero`, `--tensor` and the rest, and what that changes for the loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.dist.watcher import Watcher
from fasttrain.parallel import ContextParallel, DataParallel, shard
from fasttrain.parallel.sharded import Sharded
from fasttrain.train import making
from fasttrain.train.config import TrainConfig
from fasttrain.train.model import VOCABULARY
from fasttrain.train.objective import IGNORED, loss_of_logits, nats_of_logits, own_positions, wire_of
from fasttrain.train.validation import Sums

FLOAT = 4  # bytes of a parameter, and of its gradient unless --wire says otherwise


class Divided(NamedTuple):
    """A model on the processes of a mesh.

    Attributes:
        model: what reduces its gradients.
        mesh: the processes.
        called: what is called with a batch; of a pipeline the parts of this process.
    """

    model: DataParallel | Sharded
    mesh: Mesh
    called: nn.Module


def divide(config: TrainConfig, mesh: Mesh, vocabulary: int = VOCABULARY) -> Divided:
    """Make the model of a run, each process only what it has of it; the optimizer afterwards (`recipe.build`)."""
    made = making.blank(config, mesh, vocabulary)
    if config.context > 1:
        made.context = ContextParallel(mesh)
    if config.tensor > 1 or config.pipeline > 1:
        made = _cut(config, mesh, made)
    if config.tensor > 1:  # faster on gloo than the mesh's own group, and nobody else's
        made.loss_wire = mesh.wire("tensor", use="loss")
    model = making.finish(config, made, mesh.device)
    if config.zero < 3:
        wrapped = DataParallel(model, mesh=mesh, wire=config.wire, broadcast_buffers=False, init_sync=False)
        return Divided(wrapped, mesh, wrapped)
    watch = mesh.wire().watch
    sharded = shard(model, mesh, blocks="blocks", wire=config.wire, init_sync=False, timeout_s=mesh.timeout_s,
                    watch=watch if isinstance(watch, Watcher) else False)
    return Divided(sharded, mesh, sharded.module)


def _cut(config: TrainConfig, mesh: Mesh, model: nn.Module) -> nn.Module:
    from fasttrain.parallel.pipeline import split
    from fasttrain.parallel.pipeline.costs import counted
    from fasttrain.parallel.tensor import tensor_parallel

    sample = None  # with experts, whose rows depend on numbers: parameters are counted in the place of operations
    if not config.experts:
        sample = torch.zeros(1, config.sequence, dtype=torch.long, device="meta")
    costs = counted(model, sample) if config.pipeline > 1 else None
    model = tensor_parallel(model, mesh, sequence=config.sequence_parallel)
    if costs is None:
        return model
    return split(model, mesh, config.stages, costs=costs, schedule=config.pipeline_schedule)


class Pipelines(NamedTuple):
    """Of a model in stages: what trains it, and what validates it."""

    training: Any
    validating: Any

    @classmethod
    def of(cls, config: TrainConfig, divided: Divided) -> Pipelines:
        """Made on every process, after the optimizer."""
        from fasttrain.parallel.experts import carry
        from fasttrain.parallel.pipeline import Pipeline

        module = divided.called.module if isinstance(divided.called, DataParallel) else divided.called

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return loss_of_logits(logits, own_positions(module, targets), config.label_smoothing, config.z_loss,
                                  wire_of(module))

        def nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
            own = own_positions(module, targets)
            return nats_of_logits(logits, own, wire_of(module)), int((own != IGNORED).sum())

        if config.experts:
            carry(module, 1 / config.accumulate)  # only the last stage has a loss to which theirs could be added
        context = making.precision_of(config, divided.mesh.device).autocast
        training, validating = (Pipeline(divided.model, divided.mesh, how, config.pipeline_schedule, config.accumulate,
                                         context=context) for how in (loss, nats))
        return cls(training, validating)

    def sums(self, inputs: Tensor, targets: Tensor) -> Sums:
        """As `fasttrain.train.validation.summed`."""
        self.validating.evaluate(inputs, targets)
        nats, items, _ = self.validating.sums
        return nats, nats.new_tensor(float(items))

    def close(self) -> None:
        """Leave their groups."""
        self.training.close()
        self.validating.close()


def bytes_by_formula(config: TrainConfig, divided: Divided) -> float:
    """What a process sends in a step, by the formulas of its stage of ZeRO (docs/buckets.md) and of its pipeline.

    What ranks along tensor, expert and context send each other within the model is not in it, nor is it counted.
    """
    model = divided.model
    if isinstance(model, Sharded):
        gradient, piped = FLOAT // 2 if config.wire == "bf16" else FLOAT, config.pipeline > 1
        # The formula gathers parameters twice for each micro-batch; a pipeline keeps them gathered for a step.
        sent = model.bytes_per_step(gradient, FLOAT / 2 if piped else FLOAT, 1 if piped else config.accumulate)
    else:
        sent = model.reducer.bytes_per_step()
    return sent + (of_pipeline(config, divided) if config.pipeline > 1 else 0)


def of_pipeline(config: TrainConfig, divided: Divided) -> int:
    """Bytes of activations, and of their gradients, that the stages of this process send to those of others."""
    from fasttrain.parallel.pipeline import held

    here = held.of(divided.called.module if isinstance(divided.called, DataParallel) else divided.called)
    rank, last = here.placement.rank, here.placement.stages - 1
    ends = sum((stage < last and rank(stage + 1) != here.rank) + (stage > 0 and rank(stage - 1) != here.rank)
               for stage in here.mine)
    positions = config.sequence // config.context // (config.tensor if config.sequence_parallel else 1)
    width = FLOAT // (2 if config.precision.endswith("pure") else 1)
    return ends * (config.batch // config.replicas) * positions * config.width * width


def all_counted(model: DataParallel | Sharded) -> bool:
    """Whether our wires count all that is sent: of a sharded model torch sends all on NCCL, and sums of copies."""
    if not isinstance(model, Sharded) or model.terms == 1:
        return True
    return model.wire.backend == "gloo" and model.wire.size == model.terms
