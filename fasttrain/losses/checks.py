"""What every cross-entropy asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from fasttrain.kernels.cross_entropy import SUPPORTED

REDUCTIONS = ("mean", "sum", "none")


def check_numbers(label_smoothing: float, z_loss: float, reduction: str) -> None:
    """Raise ValueError for what no loss is made of."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: it is a share, from 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss is {z_loss}: the factor of a penalty is not negative (PaLM has 1e-4)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: it is one of {', '.join(REDUCTIONS)}")


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raise TypeError for tensors that the kernels do not take."""
    if hasattr(logits, "placements"):
        raise TypeError(f"{name} are a DTensor: give cross_entropy the DTensor, or vocab_parallel_cross_entropy each "
                        f"rank's own classes, {name}.to_local()")
    if logits.dtype not in SUPPORTED:
        raise TypeError(f"{name} are {spelled(logits)}; cross-entropy takes "
                        f"{', '.join(str(dtype).removeprefix('torch.') for dtype in SUPPORTED)}")


def check_targets(logits: Tensor, targets: Tensor, name: str = "logits") -> None:
    """Raise if targets are no indices of classes, one for each row."""
    if logits.dim() == 0:
        raise ValueError(f"{name} have no dimension: their last one is that of the classes")
    if targets.is_floating_point() and targets.shape == logits.shape:
        raise TypeError(f"targets are {spelled(targets)} of the shape of the {name}: probabilities are not taken here, "
                        "only indices of classes; use torch.nn.functional.cross_entropy")
    if targets.is_floating_point() or targets.is_complex() or str(targets.dtype) == "torch.bool":
        raise TypeError(f"targets are {spelled(targets)}: they are indices of classes, int64, int32 or uint8")
    if targets.shape != logits.shape[:-1]:
        shapes = f"{name} of shape {tuple(logits.shape)}, targets of shape {tuple(targets.shape)}"
        if logits.dim() > 2 and targets.shape == (logits.shape[0], *logits.shape[2:]):
            raise ValueError(f"{shapes}: the classes are the last dimension here, the second in torch.nn.functional; "
                             f"give {name}.movedim(1, -1)")
        raise ValueError(f"{shapes}: there must be one target for each row, of shape {tuple(logits.shape[:-1])}")
    if targets.device != logits.device:
        raise ValueError(f"{name} are on {logits.device} and targets on {targets.device}: move one to the other")


def spelled(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
