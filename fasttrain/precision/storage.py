"""The storage policy: how parameters, states and an EMA are kept, independent of the optimizer.

A policy is a set of options of a parameter group (or of all groups, as arguments of the optimizer):

==================  ===================================================================================================
option              values
==================  ===================================================================================================
``master``          how a 16-bit parameter keeps the digits that it cannot hold: "none", "fp32" (a copy), "split" (a
                    16-bit remainder; together exactly an fp32 number; bfloat16 only), "split8" (an 8-bit remainder;
                    bfloat16 only), "kahan" (16-bit compensation), "stochastic" (none: rounded at random, unbiased)
``state_dtype``     "fp32", "bf16", "fp16", "int8", "e4m3" or "fp8", "e5m2", "int4", or the torch dtype; or a dict from
                    a state's name to one of these. Without it: torch's, which is the parameter's; fp32 if the master
                    makes the parameter an fp32 number
``state_rounding``  "nearest" or "stochastic". Without it: stochastic for a state that is kept narrower than it would
                    be without ``state_dtype`` and that retains more than 1 - 2^-8 of its old value in a step
``ema_decay``       keep an exponential moving average of the parameter: ema = decay * ema + (1 - decay) * parameter
``ema_dtype``       "fp32" (the default; fp64 for fp64 parameters), or "bf16" or "fp16", rounded stochastically
``min_size``        parameters with fewer elements keep fp32 states where ``state_dtype`` is a block code (4096)
``clip_value``      elements of the gradient are brought into [-clip_value, clip_value]
``clip_each``       the gradient of each parameter is scaled down to this norm if it has a larger one
``zero_gradients``  True: a step leaves the gradients zeroed, without another pass over memory
``seed``            of what is rounded at random
==================  ===================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fasttrain.precision.codecs import NUMBER, PLAIN, POSITIVE, STOCHASTIC, codec
from fasttrain.rule import Rule

DEFAULTS: dict[str, Any] = {
    "master": "none", "state_dtype": None, "state_rounding": None, "ema_decay": None, "ema_dtype": "fp32",
    "min_size": 4096, "clip_value": None, "clip_each": None, "zero_gradients": False, "seed": 0,
}
SMALL = 2.0**-8  # of a state that loses less than this share in a step, rounding to nearest may lose nothing

PRESETS: dict[str, dict[str, Any]] = {
    "mixed": {"master": "fp32"},
    "split": {"master": "split"},
    "10-byte": {"master": "split", "state_dtype": "bf16"},
    "8-byte": {"master": "split", "state_dtype": "int8"},
    "7-byte": {"master": "split8", "state_dtype": "int8"},
    "6-byte": {"master": "stochastic", "state_dtype": "int8"},
    "5-byte": {"master": "stochastic", "state_dtype": "int4"},
}
"""Policies for bfloat16 parameters by name; the numbers are bytes per parameter of AdamW, its gradient included."""

BASES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "int8", "fp8": "e4m3", "e4m3": "e4m3", "e5m2": "e5m2",
         "int4": "int4"}
BY_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8",
            torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
MASTERS: dict[str, dict[torch.dtype, int]] = {
    "fp32": {torch.bfloat16: NUMBER["master_bf16"], torch.float16: NUMBER["master_f16"]},
    "split": {torch.bfloat16: NUMBER["split16"]},
    "split8": {torch.bfloat16: NUMBER["split8"]},
    "kahan": {torch.bfloat16: NUMBER["kahan_bf16"], torch.float16: NUMBER["kahan_f16"]},
    "stochastic": {torch.bfloat16: NUMBER["bf16"] | STOCHASTIC, torch.float16: NUMBER["f16"] | STOCHASTIC},
}
EXTRA_KEYS = {"split16": "remainder", "split8": "remainder", "master_bf16": "master", "master_f16": "master",
              "kahan_bf16": "compensation", "kahan_f16": "compensation"}


def preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Example:
        >>> preset("8-byte")
        {'master': 'split', 'state_dtype': 'int8'}

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"storage {name!r} is none of {', '.join(map(repr, PRESETS))}")
    return dict(PRESETS[name])


def normalised(options: Mapping[str, Any]) -> dict[str, Any]:
    """The storage options among those given, checked, dtypes as strings; a preset is replaced by what it stands for.

    Raises:
        ValueError: an option has a value that it cannot have.
    """
    given = preset(options["storage"]) if options.get("storage") is not None else {}
    given |= {name: options[name] for name in DEFAULTS if name in options}
    if "state_dtype" in given:
        dtype = given["state_dtype"]
        given["state_dtype"] = ({state: _dtype_name(one, f"state_dtype[{state!r}]") for state, one in dtype.items()}
                                if isinstance(dtype, Mapping) else _dtype_name(dtype, "state_dtype"))
    if "ema_dtype" in given:
        given["ema_dtype"] = _dtype_name(given["ema_dtype"], "ema_dtype")
    for name, known in (("master", ("none", *MASTERS)), ("state_rounding", (None, "nearest", "stochastic")),
                        ("ema_dtype", ("fp32", "bf16", "fp16")), ("zero_gradients", (False, True))):
        if name in given and given[name] not in known:
            raise ValueError(f"{name}={given[name]!r} is none of {', '.join(map(repr, known))}")
    decay = given.get("ema_decay")
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ValueError(f"ema_decay={decay!r} must be in [0, 1), or None")
    for name in ("clip_value", "clip_each"):
        if given.get(name) is not None and not given[name] > 0.0:
            raise ValueError(f"{name}={given[name]!r} must be positive, or None")
    for name in ("min_size", "seed"):
        if name in given and (isinstance(given[name], bool) or not isinstance(given[name], int) or given[name] < 0):
            raise ValueError(f"{name}={given[name]!r} must be an integer that is not negative")
    return given


def _dtype_name(dtype: Any, option: str) -> str | None:
    if dtype is None:
        return None
    name = BY_DTYPE.get(dtype, dtype) if isinstance(dtype, torch.dtype) else dtype
    if name == "fp8":
        name = "e4m3"
    if name not in BASES:
        raise ValueError(f"{option}={dtype!r} is none of {', '.join(BASES)}, or the torch dtype of one of these")
    return name


def is_plain(group: Mapping[str, Any]) -> bool:
    """Whether the kernels find everything as torch keeps it, and have nothing else to do than the rule."""
    return all(group.get(name, DEFAULTS[name]) == DEFAULTS[name]
               for name in ("master", "state_dtype", "ema_decay", "clip_value", "zero_gradients"))


def describe(group: Mapping[str, Any]) -> str:
    """The options of a group that differ from the defaults, as one would write them."""
    told = [f"{name}={group[name]!r}" for name in DEFAULTS if group.get(name, DEFAULTS[name]) != DEFAULTS[name]]
    return ", ".join(told) or "the defaults"


def param_codec(name: str, dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    """The number of the codec of a parameter.

    Arguments:
        name: how errors call the parameter.

    Raises:
        ValueError: its dtype cannot have the group's master.
    """
    master = group.get("master", "none")
    if master == "none":
        return PLAIN[dtype]
    if dtype not in MASTERS[master]:
        fit = " and ".join(str(known).removeprefix("torch.") for known in MASTERS[master])
        remedy = ("it holds all its digits itself: put it into a group with master='none'"
                  if dtype in (torch.float32, torch.float64) else "use master='fp32' or 'kahan'")
        raise ValueError(f"{name} is {dtype}; master={master!r} is for {fit} parameters: {remedy}")
    return MASTERS[master][dtype]


def state_codec(name: str, state: str, dtype: torch.dtype, count: int, group: Mapping[str, Any], rule: Rule,
                scalars: Mapping[str, float]) -> int:
    """The number of the codec of one state of a parameter.

    Arguments:
        name: how errors call the parameter.
        state: the state's name in the rule.
        dtype: of the parameter.
        count: elements of the parameter.
        scalars: coefficients of the rule at some step after the first: what a state retains is read from them. One that
            is not a number is not known: the state is taken for one that retains nearly everything.

    Raises:
        ValueError: the parameter's dtype cannot have such states, or the rule has no state of a name that is given.
    """
    wanted = group.get("state_dtype")
    if isinstance(wanted, Mapping):
        if unknown := [key for key in wanted if key not in rule.state]:
            raise ValueError(f"{name}: state_dtype names {unknown[0]!r}; the states are {', '.join(rule.state)}")
        wanted = wanted.get(state)
    exact = group.get("master", "none") in ("fp32", "split", "split8")
    usual = torch.float32 if exact else dtype
    if wanted is None:
        return PLAIN[usual]
    if dtype == torch.float64:
        raise ValueError(f"{name} is {dtype}, whose states are float64: put it into a group with state_dtype=None")
    number = NUMBER[BASES[wanted]]
    if state in rule.exact:
        return PLAIN[torch.float32]
    if codec(number).block and count < max(2, group.get("min_size", DEFAULTS["min_size"])):
        return PLAIN[torch.float32]
    if codec(number).block and state in rule.positive:
        number |= POSITIVE
    rounding = group.get("state_rounding")
    if rounding is None:
        narrower = codec(number).main.itemsize < usual.itemsize
        retained = scalars.get(rule.retain[state], 0.0) if state in rule.retain else 0.0
        loses = abs(retained) <= 1 - SMALL  # not if it is not a number: then it depends on what is not known yet
        rounding = "stochastic" if narrower and not loses else "nearest"
    return number | (STOCHASTIC if rounding == "stochastic" and number != NUMBER["f32"] else 0)


def ema_codec(dtype: torch.dtype, group: Mapping[str, Any]) -> int:
    """The number of the codec of a parameter's EMA."""
    if dtype == torch.float64:
        return PLAIN[dtype]
    number = NUMBER[BASES[group.get("ema_dtype", DEFAULTS["ema_dtype"])]]
    return number if number == NUMBER["f32"] else number | STOCHASTIC
