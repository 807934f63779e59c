"""Options from a TOML file: those of the command line, under the same names, which still go before it."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fasttrain.train.config import BadInput, TrainConfig


def from_file(path: Path) -> TrainConfig:
    """The options that a file gives; all others have their defaults.

    Paths in it are relative to the file.

    Raises:
        BadInput: it cannot be read, is no TOML, or has an option that there is not, or a value of another type.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "small.toml")
        >>> _ = path.write_text('steps = 50\\nlr = 1e-3\\nvalidate-every = 25\\noptimizer = "Lion"\\n')
        >>> config = from_file(path)
        >>> config.steps, config.lr, config.validate_every, config.optimizer
        (50, 0.001, 25, 'Lion')
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"--config {path}: not TOML: {error}") from error
    types_of = typing.get_type_hints(TrainConfig)
    options: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in types_of or name == "config":
            near = difflib.get_close_matches(name, types_of, n=1)
            guess = f"; perhaps you meant {near[0].replace('_', '-')}" if near else ""
            raise BadInput(f"--config {path}: there is no option {key}{guess}")
        if name in options:
            raise BadInput(f"--config {path}: {key} is given twice, with - and with _")
        options[name] = _value(path, key, value, types_of[name])
    return TrainConfig(**options)


def config_argument(arguments: Sequence[str]) -> Path | None:
    """The file that ``--config`` names among the arguments of ``fasttrain train``, if it is there.

    Raises:
        BadInput: it is there twice, or without a file.

    Example:
        >>> config_argument(["train", "--steps", "5", "--config", "small.toml"])
        PosixPath('small.toml')
    """
    found: list[str | None] = []
    for at, argument in enumerate(arguments):
        if argument == "--config":
            found.append(arguments[at + 1] if at + 1 < len(arguments) else None)
        elif argument.startswith("--config="):
            found.append(argument.removeprefix("--config="))
    if len(found) > 1:
        raise BadInput("--config is given twice: put all options in one file, or on the command line")
    if found and not found[0]:
        raise BadInput("--config needs the name of a file")
    return Path(found[0]) if found and found[0] else None


def _value(path: Path, key: str, value: Any, kind: Any) -> Any:
    """A value of the file as an option of this type."""
    kinds = get_args(kind) if get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for one in kinds:
        if get_origin(one) is Literal:
            if value in get_args(one) and not isinstance(value, bool):
                return value
        elif one is Path and isinstance(value, str):
            return path.parent / Path(value).expanduser()
        elif one is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif one is not Path and type(value) is one:
            return value
    wanted = " or ".join(_named(one) for one in kinds if one is not type(None))
    raise BadInput(f"--config {path}: {key} = {value!r} is not {wanted}")


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path, as a text"}
    return names[kind]


def differences(old: TrainConfig, new: TrainConfig, free: Sequence[str] = ()) -> list[str]:
    """Options that differ, in words; `free` ones may.

    Example:
        >>> differences(TrainConfig(), TrainConfig(batch=32, steps=5), free=["steps"])
        ['--batch was 16 and is 32']
    """
    return [f"--{field.name.replace('_', '-')} was {getattr(old, field.name)} and is {getattr(new, field.name)}"
            for field in dataclasses.fields(TrainConfig)
            if field.name not in free and getattr(old, field.name) != getattr(new, field.name)]
