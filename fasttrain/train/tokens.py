"""Token files in the place of text: what ``fasttrain tokenize`` wrote, mapped into memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.dataset import TokenDataset, read_index
from fasttrain.data.encoders import Bytes
from fasttrain.data.errors import DataError
from fasttrain.train.config import BadInput

HELD_OUT = "validation"  # the split of that name


@dataclass(frozen=True)
class Tokens:
    """The two splits of a directory of token files; the counterpart of `fasttrain.train.text.Text`.

    Attributes:
        train, held_out: of one tokenizer.
    """

    train: TokenDataset
    held_out: TokenDataset

    @property
    def unit(self) -> str:
        """What a token is: "byte", if each is one, else "token"."""
        return "byte" if self.train.tokenizer == Bytes.fingerprint.hex() else "token"

    @property
    def vocabulary(self) -> int:
        """One more than the largest token there may be."""
        return self.train.vocabulary

    @property
    def sha256(self) -> str:
        """Of the fingerprints of both splits, which hold the checksums of all tokens."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.held_out.fingerprint}".encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return {
            f"train_{self.unit}s": len(self.train), "train_documents": self.train.documents,
            f"held_out_{self.unit}s": len(self.held_out), "held_out_documents": self.held_out.documents,
            "vocabulary": self.vocabulary, "tokenizer": self.train.tokenizer,
            "fingerprints": [self.train.fingerprint, self.held_out.fingerprint], "sha256": self.sha256,
        }


def load(folder: Path, sequence: int) -> Tokens:
    """Open the token files in `folder`. Their headers and sizes are read and checked; tokens when a run reads them.

    Raises:
        BadInput: it was not written by ``fasttrain tokenize``, is damaged, holds nothing out, or has fewer tokens than
            `sequence` needs.
    """
    if not folder.is_dir():
        why = "is a file" if folder.exists() else "does not exist"
        raise BadInput(f"--tokens {folder}: {why}; give the directory that fasttrain tokenize --out wrote")
    try:
        if HELD_OUT not in read_index(folder)["splits"]:
            raise BadInput(f"--tokens {folder}: no tokens are held out for validation; make them again with "
                           f"fasttrain tokenize --held-out 0.03")
        train = TokenDataset(folder)
        rest = TokenDataset(folder, HELD_OUT, vocabulary=train.vocabulary, tokenizer=train.tokenizer)
    except DataError as error:
        raise BadInput(f"--tokens: {error}") from error
    for part, stream, needed in (("to train on", train, 2 * sequence + 1), ("held out", rest, sequence + 1)):
        if len(stream) < needed:
            raise BadInput(f"--sequence {sequence} is too long for {folder}: there are {len(stream)} tokens {part}, "
                           f"and must be at least {needed}; use a shorter sequence or more text")
    return Tokens(train, rest)


def cut(stream: np.ndarray | TokenDataset, starts: np.ndarray, width: int) -> np.ndarray:
    """`width` tokens of a stream from each of `starts`: (len(starts), width), of the stream's dtype.

    Example:
        >>> cut(np.arange(9, dtype=np.uint8), np.array([0, 4]), 3)
        array([[0, 1, 2],
               [4, 5, 6]], dtype=uint8)
    """
    if isinstance(stream, TokenDataset):
        return stream.gather(starts, width)
    return np.stack([stream[start : start + width] for start in starts.tolist()])
