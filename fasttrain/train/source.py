"""What a run reads, text or token files, and how its size is told."""

from __future__ import annotations

from typing import Any, NamedTuple

from fasttrain.train import text, tokens
from fasttrain.train.config import TrainConfig

Source = text.Text | tokens.Tokens


def load(config: TrainConfig) -> Source:
    """The text or the tokens that a run's options name.

    Raises:
        BadInput: as `fasttrain.train.text.load` and `fasttrain.train.tokens.load`.
    """
    if config.tokens is not None:
        return tokens.load(config.tokens, config.sequence)
    return text.load(config.text, config.held_out, config.sequence)


class Extent(NamedTuple):
    """How much a run reads.

    Attributes:
        unit: "byte" or "token": what the model predicts, and what validation counts.
        whole: "files" or "documents".
        train, held_out: in units.
        train_wholes, held_out_wholes: how many files or documents.
    """

    unit: str
    whole: str
    train: int
    held_out: int
    train_wholes: int
    held_out_wholes: int

    @classmethod
    def of(cls, about: dict[str, Any]) -> Extent:
        """From what ``config.json`` says under "text".

        Example:
            >>> Extent.of({"train_bytes": 90, "train_files": 3, "held_out_bytes": 10, "held_out_files": 1}).unit
            'byte'
        """
        unit = "token" if "train_tokens" in about else "byte"
        whole = "documents" if "train_documents" in about else "files"
        return cls(unit, whole, about[f"train_{unit}s"], about[f"held_out_{unit}s"], about[f"train_{whole}"],
                   about[f"held_out_{whole}"])
