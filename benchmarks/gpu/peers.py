"""Other packages' optimizers: those that can be imported, and why the others cannot."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

PACKAGES = ("torch", "apex", "TransformerEngine", "DeepSpeed", "bitsandbytes", "torchao", "FlashOptim", "optimi")
LR, DECAY = 1e-3, 0.01


class Peer(NamedTuple):
    """Where an optimizer is, and with what options."""

    module: str
    name: str
    options: Mapping[str, Any] = {}


FP32 = {
    "torch fused": Peer("torch.optim", "AdamW", {"fused": True}),
    "torch foreach": Peer("torch.optim", "AdamW", {"foreach": True}),
    "apex": Peer("apex.optimizers", "FusedAdam", {"adam_w_mode": True}),
    "TransformerEngine": Peer("transformer_engine.pytorch.optimizers", "FusedAdam", {"adam_w_mode": True}),
    "DeepSpeed": Peer("deepspeed.ops.adam", "FusedAdam", {"adam_w_mode": True}),
    "optimi": Peer("optimi", "AdamW"),
}
MASTERS = {  # bfloat16 parameters with an exact fp32 master
    "apex": Peer("apex.optimizers", "FusedAdam", {"adam_w_mode": True, "master_weights": True}),
    "TransformerEngine": Peer("transformer_engine.pytorch.optimizers", "FusedAdam",
                              {"adam_w_mode": True, "master_weights": True, "store_param_remainders": True}),
}
CODED = {  # bfloat16 parameters and states of 8 bits
    "bitsandbytes": Peer("bitsandbytes.optim", "AdamW8bit"),
    "torchao": Peer("torchao.optim", "AdamW8bit"),
    "FlashOptim": Peer("flashoptim", "FlashAdamW"),
}


def found(table: Mapping[str, Peer]) -> tuple[dict[str, Any], dict[str, str]]:
    """A maker of an optimizer's step for each peer that can be imported, and the reason for each that cannot."""
    makers, absent = {}, {}
    for name, peer in table.items():
        try:
            kind = getattr(importlib.import_module(peer.module), peer.name)
        except Exception as error:  # whatever a package built for another torch raises is why it is absent
            absent[name] = reason(error)
            continue

        def make(params: list[Parameter], kind: Any = kind, options: Any = peer.options) -> Any:
            return kind(params, lr=LR, weight_decay=DECAY, **options).step

        makers[name] = make
    return makers, absent


def reason(error: Exception) -> str:
    """In one line, with what a failed attempt had allocated given back."""
    if torch.cuda.is_available() and isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
