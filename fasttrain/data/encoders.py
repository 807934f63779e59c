"""What makes tokens of text: its bytes, or a file of Hugging Face's `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from fasttrain.data.documents import SEPARATOR
from fasttrain.data.errors import DataError

PIECE = 1 << 20  # bytes of text that are encoded at once
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")  # of documents, in use


class NotText(Exception):
    """A document that the tokenizer cannot read."""


class Bytes:
    """Every byte is a token, and zero ends a document.

    Example:
        >>> Bytes().encode(b"ab").tolist()
        [97, 98]
    """

    name, vocabulary, separator, content = "bytes", 256, 0, None
    fingerprint = xxhash.xxh3_128_digest(b"fasttrain: bytes")

    def check(self, piece: bytes) -> None:
        """Refuse what has a zero byte.

        Raises:
            NotText: it has.
        """
        if SEPARATOR in piece:
            raise NotText("it contains a zero byte")

    def encode(self, piece: bytes) -> np.ndarray:
        return np.frombuffer(piece, np.uint8)


class File:
    """A tokenizer from a file in the format of Hugging Face's `tokenizers` (``tokenizer.json``).

    Special tokens that the file adds around texts are left out, as are truncation and padding; `end` follows every
    document. Text is encoded in pieces of about a megabyte that end with a line.

    Args:
        path: the file.
        end: the token that ends every document; None: one of the usual ones, if the vocabulary has any.

    Raises:
        DataError: the file is no tokenizer, or has no such token; or the package is missing.
    """

    def __init__(self, path: Path, end: str | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise DataError("a tokenizer from a file needs the package tokenizers: pip install "
                            "'fasttrain[data]'") from error
        try:
            self.content = path.read_bytes()
        except OSError as error:
            raise DataError(f"the tokenizer {path} cannot be read: {error.strerror}; give 'bytes', or the path of a "
                            f"tokenizer.json") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.content)
        except Exception as error:  # what it raises is of no class of its own
            raise DataError(f"{path} is not a file of Hugging Face's tokenizers: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        if not known:
            raise DataError(f"{path} has an empty vocabulary: train the tokenizer first")
        if end is not None and end not in known:
            raise DataError(f"{path} has no token {end!r} to end documents with: name one that it has")
        found = end if end is not None else next((token for token in ENDS if token in known), None)
        self.path, self.end, self.name = path, end, path.name
        self.vocabulary = max(known.values()) + 1
        self.separator = -1 if found is None else known[found]
        self.fingerprint = xxhash.xxh3_128_digest(self.content)

    def __reduce__(self) -> tuple[type, tuple[Path, str | None]]:
        return File, (self.path, self.end)

    def check(self, piece: bytes) -> None:
        """Refuse what is not UTF-8.

        Raises:
            NotText: it is not.
        """
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            raise NotText(f"it is not UTF-8: {error.reason}") from error

    def encode(self, piece: bytes) -> np.ndarray:
        encoded, = self._tokenizer.encode_batch_fast([piece.decode()], add_special_tokens=False)
        return np.array(encoded.ids, np.int64)


def encoder_of(tokenizer: str | Path, end: str | None) -> Bytes | File:
    """The encoder that "bytes", or the path of a file, names.

    Raises:
        DataError: as `File`; or `end` is given with bytes.
    """
    if str(tokenizer) != "bytes":
        return File(Path(tokenizer), end)
    if end is not None:
        raise DataError(f"the token {end!r} to end documents with goes with a tokenizer from a file: bytes end them "
                        f"with 0")
    return Bytes()


def pieces_of(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """What stands in a file between two places, in pieces that end with a line, or at least with a character.

    Raises:
        DataError: the file cannot be read, or is not as long any more.
    """
    left, rest = end - begin, b""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            while left:
                read = file.read(min(PIECE, left))
                if not read:
                    raise DataError(f"{path} became shorter while it was read: start again")
                left -= len(read)
                rest += read
                cut = len(rest) if not left else rest.rfind(b"\n") + 1 or last_character(rest)
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def last_character(text: bytes) -> int:
    """Where the last character begins, which may be cut: before it text can be divided."""
    place = len(text) - 1
    while place > 0 and text[place] & 0xC0 == 0x80:
        place -= 1
    return place
