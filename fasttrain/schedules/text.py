"""Schedules from their text: names, numbers, `+` and `*`, and nothing that is evaluated."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from typing import Any

from fasttrain.schedules.falls import exponential, multi_step, points, step_decay
from fasttrain.schedules.pieces import cosine, inverse_sqrt, linear, polynomial, restarts, warmup
from fasttrain.schedules.runs import cyclic, decay, one_cycle, warmup_cosine, warmup_stable_decay
from fasttrain.schedules.schedule import Schedule, constant, first, rounded

LONGEST = 4000  # characters, so that no text can be nested deeper than the parser goes
KNOWN: dict[str, Callable[..., Schedule]] = {one.__name__: one for one in (
    constant, warmup, linear, cosine, restarts, polynomial, inverse_sqrt, exponential, step_decay, multi_step, points,
    decay, cyclic, one_cycle, warmup_cosine, warmup_stable_decay, first, rounded)}


def parse(text: str) -> Schedule:
    """The schedule of a text, as `repr` writes it.

    Arguments:
        text: calls of the functions of `fasttrain.schedules` with numbers, strings, tuples and schedules, joined with
            `+` and multiplied with `*`.

    Raises:
        ValueError: it is something else, or a function refuses its arguments; the message names the place.

    Example:
        >>> parse("0.5 * (warmup(100) + cosine(1000, floor=0.1))")(600)
        0.275
    """
    if len(text) > LONGEST:
        raise ValueError(f"a schedule of {len(text)} characters: at most {LONGEST} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "1if" is a warning to Python, and no schedule: SyntaxError
            body = ast.parse(text.strip(), mode="eval").body
        made = _value(body, text.strip())
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no schedule: {error.msg} at character {error.offset}") from error
    except RecursionError as error:
        raise ValueError(f"{text[:40]!r}... is nested too deeply for a schedule") from error
    if not isinstance(made, Schedule):
        raise ValueError(f"{text!r} is no schedule, but the value {made!r}: write constant({made!r}), for example")
    return made


def _value(node: ast.expr, text: str) -> Any:
    here = ast.get_source_segment(text, node) or text
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_value(one, text) for one in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) \
            and isinstance(node.operand.value, (int, float)):
        return -node.operand.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _value(node.left, text), _value(node.right, text)
        if not all(isinstance(one, (int, float, Schedule)) for one in (left, right)):
            raise ValueError(f"{here!r}: only schedules and numbers are joined and multiplied")
        if not any(isinstance(one, Schedule) for one in (left, right)):
            raise ValueError(f"{here!r}: numbers are not computed with here: write the result")
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(left, Schedule) and isinstance(right, Schedule):
            return left + right
        raise ValueError(f"{here!r}: only a schedule follows a schedule: write constant(...) for a number")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _called(node, node.func.id, here, text)
    raise ValueError(f"{here!r} is neither a schedule nor a number; there are {', '.join(KNOWN)}, joined with + and "
                     "multiplied with *")


def _called(node: ast.Call, name: str, here: str, text: str) -> Schedule:
    if name not in KNOWN:
        raise ValueError(f"{here!r}: there is no schedule {name}; there are {', '.join(KNOWN)}")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"{here!r}: write the arguments themselves, without **")
    arguments = [_value(one, text) for one in node.args]
    keywords = {str(one.arg): _value(one.value, text) for one in node.keywords}
    try:
        return KNOWN[name](*arguments, **keywords)
    except TypeError as error:
        raise ValueError(f"{here!r}: {error}") from error
    except AttributeError as error:  # a number where a schedule belongs
        raise ValueError(f"{here!r}: a schedule is missing among the arguments") from error
