"""A stage as torch's schedules take it: a thin view of the model, which tells what ran and keeps no idle buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from fasttrain.dist.wire import Wire
from fasttrain.parallel.pipeline.boundaries import Boundary
from fasttrain.parallel.pipeline.clock import Action
from fasttrain.parallel.pipeline.forward import counted
from fasttrain.parallel.pipeline.held import Held


class View(nn.Module):
    """The parts of one stage of a model that has others too; it owns nothing.

    Arguments:
        model: what the rank holds.
        names: of the parameters that the stage uses.
        run: from (number of the micro-batch, what came from the stage before) to what goes to the next one.
    """

    number: int
    _of: tuple[nn.Module, list[str], Callable[..., Any]]

    def __init__(self, model: nn.Module, names: list[str], run: Callable[..., Any]):
        super().__init__()
        self._of = model, names, run  # in a tuple: not as a submodule
        self.number = 0

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        model, names, _ = self._of
        return iter({id(p): p for p in map(model.get_parameter, names)}.values())

    def forward(self, *given: Tensor) -> Any:
        _, _, run = self._of
        return detachable(run(self.number, *given))


def detachable(given: Any) -> Any:
    """Outputs that can be sent and let go of: contiguous, and no views, from which autograd cannot be cut in place."""
    if isinstance(given, (tuple, list)):
        return tuple(detachable(one) for one in given)
    given = given.contiguous()
    return given.clone() if torch.is_grad_enabled() and given.requires_grad and given._is_view() else given


class Stage(PipelineStage):
    """torch's stage, with its actions recorded and its traffic counted.

    torch keeps a buffer for every micro-batch and each direction as long as the stage lives, whatever the schedule;
    here one is made when its message is expected, and goes with the activation.

    Arguments:
        log: to which actions are added.
        others: see PipelineStage.
    """

    def __init__(self, view: View, index: int, count: int, device: torch.device, inputs: tuple[Tensor, ...],
                 outputs: tuple[Tensor, ...], wire: Wire, log: list[Action]):
        super().__init__(view, index, count, device, input_args=inputs, output_args=outputs, group=wire.group)
        self.view, self.wire, self.log = view, wire, log

    # --- What ran -----------------------------------------------------------------------------------------------------

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.view.number = fwd_chunk_id
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self.log.append(Action("F", self.stage_index, fwd_chunk_id))
        _empty(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True,
                           last_backward: bool = False) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self.log.append(Action("B" if full_backward else "I", self.stage_index, bwd_chunk_id))
        _empty(self.grad_recv_info.get(bwd_chunk_id, ()))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.log.append(Action("W", self.stage_index, bwd_chunk_id))

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Gradients are reduced by the pipeline: torch's would look for `fully_shard` on the view."""

    # --- Buffers ------------------------------------------------------------------------------------------------------

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        done = super()._prepare_forward_infra(*args, **kwargs)
        for infos in self.args_recv_info.values():
            _empty(infos)
        return done

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        done = super()._prepare_backward_infra(*args, **kwargs)
        for infos in self.grad_recv_info.values():
            _empty(infos)
        return done

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        _fill(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        _fill(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    # --- Messages -----------------------------------------------------------------------------------------------------

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self._counted("activations", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        if bwd_chunk_id in self.bwd_cache:  # a gradient may be an expanded scalar, for example
            self.bwd_cache[bwd_chunk_id] = tuple(
                grad.contiguous() if isinstance(grad, Tensor) else grad for grad in self.bwd_cache[bwd_chunk_id])
        return self._counted("gradients", super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, kind: str, ops: list[Any]) -> list[Any]:
        for op in ops:
            counted(self.wire, kind, op.tensor.nbytes)
        return ops


def stages_of(model: nn.Module, held: Held, between: Sequence[Boundary], run: Callable[[int, int, Any], Any],
              wire: Wire, log: list[Action]) -> list[Any]:
    """The stages of this rank.

    Arguments:
        model, held: what it has.
        between: what goes from each stage to the next.
        run: a stage on the number of a micro-batch and what the stage before gave.
        wire, log: see `Stage`.
    """
    count = held.placement.stages
    first, last = (torch.empty(1, dtype=torch.int64),), (torch.empty(1, requires_grad=True),)  # a number; the loss
    stages = []
    for index in held.mine:
        def forward(number: int, *given: Tensor, index: int = index) -> Any:
            return run(index, number, between[index - 1].given(given) if index else None)

        stages.append(Stage(View(model, held.names[index], forward), index, count, wire.device,
                            between[index - 1].empty("meta") if index else first,
                            between[index].empty("meta") if index < count - 1 else last, wire, log))
    return stages


def _empty(infos: Any) -> None:
    """Let go of the buffers of a micro-batch."""
    for info in infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None and not buffer.is_meta:
            info.buffer = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device="meta",
                                              requires_grad=buffer.requires_grad)


def _fill(infos: Any, device: torch.device) -> None:
    """Make buffers for a message that is expected."""
    for info in infos:
        buffer = getattr(info, "buffer", None)
        if buffer is not None and buffer.is_meta:
            info.buffer = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=device,
                                              requires_grad=buffer.requires_grad)
