"""The numbers of a run for TensorBoard, as an extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttrain.train.config import BadInput


class TensorBoard:
    """Writes every number of the records that it is called with as a scalar; a callback of the loop.

    Arguments:
        directory: for its files; give the parent to `tensorboard --logdir`.

    Raises:
        BadInput: the package tensorboard is not installed.
    """

    def __init__(self, directory: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            remedy = "pip install 'fasttrain[tensorboard]'"
            raise BadInput(f"--tensorboard: its package is not installed: {remedy}") from error
        self._writer: Any = SummaryWriter(str(directory))

    def __call__(self, record: dict[str, Any]) -> None:
        """Write one record."""
        for name, value in _numbers(record):
            self._writer.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()


def _numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    """(name, value) of the numbers in a record, those of inner dicts with a slash.

    Example:
        >>> _numbers({"event": "train", "step": 4, "loss": 2.5, "share": {"data": 0.25}, "note": "text"})
        [('loss', 2.5), ('share/data', 0.25)]
    """
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += [(f"{name}/{inner}", v) for inner, v in _numbers({"step": 0, **value})]
        elif isinstance(value, (int, float)) and name != "step":
            found.append((name, value))
    return found
