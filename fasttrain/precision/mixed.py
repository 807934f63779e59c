"""One choice of precision for a training run: in what it computes, what is cast, what is kept, and what is scaled.

Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740: masters in fp32, a loss scale for fp16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttrain.precision.loss_scale import LossScaler


class Mode(NamedTuple):
    """What a name stands for: the dtype of matrix products, whether parameters have it too, and the master then."""

    dtype: torch.dtype
    pure: bool = False
    master: str = "none"


MODES = {
    "fp32": Mode(torch.float32),
    "bf16": Mode(torch.bfloat16),
    "fp16": Mode(torch.float16),
    "bf16-pure": Mode(torch.bfloat16, True, "split"),
    "fp16-pure": Mode(torch.float16, True, "fp32"),
}
SHORT = (torch.bfloat16, torch.float16)
MOST_NAMES = 8


class Precision:
    """The precision of a run; the same object says so to the model, the optimizer and the loop.

    ============  ===========  ============  ==========  ============================================
    name          parameters   computes in   loss scale  fp32 is kept
    ============  ===========  ============  ==========  ============================================
    "fp32"        fp32         fp32          no          everywhere
    "bf16"        fp32         bf16          no          parameters, gradients, states; autocast's list
    "fp16"        fp32         fp16          yes         parameters, gradients, states; autocast's list
    "bf16-pure"   bf16         bf16          no          masters (split: exact), states
    "fp16-pure"   fp16         fp16          yes         masters (copies), states
    ============  ===========  ============  ==========  ============================================

    All work on the CPU and on GPUs. Matrix products add in fp32 inside, and norms of gradients are fp32 or better, in
    all of them.

    Arguments:
        name: one of these.
        device: "cpu" or "cuda", or a `torch.device`: where the model is.
        keep: of pure modes: patterns (`re.fullmatch`) of names of parameters and buffers that stay fp32, as a table of
            frequencies should. The model then computes under autocast, which lets both kinds meet. Batch normalisations
            stay fp32 without being named, and need no autocast.

    Attributes:
        name, device, dtype: of matrix products.
        pure: parameters have it too.

    Raises:
        ValueError: an unknown name, `keep` without a pure mode, or a GPU that cannot compute in it.

    Example:
        >>> from fasttrain.optim import AdamW
        >>> precision = Precision("bf16-pure")
        >>> model = precision.cast(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        >>> optimizer = AdamW(precision.groups(model.named_parameters()), lr=0.1)
        >>> precision.check(model, optimizer)
        >>> with precision.autocast():
        ...     loss = model(precision.input(torch.randn(8, 4))).float().square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> print(precision.describe(model))
        bf16-pure on cpu: computes in bfloat16, 20 of 28 parameters are bfloat16, no loss scale.
        Kept in fp32: parameters 1.weight, 1.bias; buffers 1.running_mean, 1.running_var; masters (master='split'),
        states of the optimizer, its average (ema_decay) and the norm of the gradients.
    """

    def __init__(self, name: str = "fp32", device: str | torch.device = "cpu", *, keep: Iterable[str] = ()):
        if name not in MODES:
            raise ValueError(f"precision {name!r} is none of {', '.join(map(repr, MODES))}")
        self.name, self.device = name, torch.device(device)
        self.dtype, self.pure, self.master = MODES[name]
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        if self.keep and not self.pure:
            raise ValueError(f"keep={self.keep!r} with precision {name!r}: its parameters are all fp32; leave it out, "
                             "or use 'bf16-pure' or 'fp16-pure'")
        if self.device.type == "cuda" and self.dtype == torch.bfloat16 \
                and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(f"precision {name!r}: this GPU does not compute in bfloat16; use 'fp16' or 'fp32'")

    def __repr__(self) -> str:
        keep = f", keep={self.keep!r}" if self.keep else ""
        return f"Precision({self.name!r}, {str(self.device)!r}{keep})"

    # --- The model ----------------------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model and the loss are computed; backward goes outside of it."""
        if self.dtype == torch.float32 or (self.pure and not self.keep):
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def cast(self, model: nn.Module) -> nn.Module:
        """The model, whose parameters and buffers were cast in place, in pure modes; else as it is.

        Before the optimizer is made, and before it is wrapped or sharded. What is kept stays: batch normalisations, the
        parameters in `keep`, and what is no floating-point number of 32 bits.

        Raises:
            ValueError: a pattern in `keep` names nothing.
        """
        if not self.pure:
            return model
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        if idle := [one for one in self.keep if not any(re.fullmatch(one, name) for name, _ in named)]:
            raise ValueError(f"keep: {idle[0]!r} names no parameter or buffer; there are "
                             f"{_some([name for name, _ in named])}")
        kept = {id(tensor) for name, tensor in named if any(re.fullmatch(one, name) for one in self.keep)}
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase) and getattr(module, "track_running_stats", False):
                    continue
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if tensor.dtype == torch.float32 and id(tensor) not in kept:
                        tensor.data = tensor.data.to(self.dtype)
        return model

    def input(self, tensor: Tensor) -> Tensor:
        """An input of floating-point numbers, as a model that was cast takes it; others as they are."""
        return tensor.to(self.dtype) if self.pure and not self.keep and tensor.is_floating_point() else tensor

    # --- The optimizer ------------------------------------------------------------------------------------------------

    def optimizer_options(self) -> dict[str, Any]:
        """The storage options for an optimizer of fasttrain, if all parameters were cast; else see `groups`.

        Example:
            >>> Precision("bf16-pure").optimizer_options(), Precision("bf16").optimizer_options()
            ({'master': 'split'}, {})
        """
        return {"master": self.master} if self.pure else {}

    def groups(self, params: Any) -> list[dict[str, Any]]:
        """Parameter groups with those options where they belong: each group is divided by what was cast and what not.

        Arguments:
            params: parameters, named parameters or groups, as for an optimizer.
        """
        given = list(params)
        groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
        made = []
        for group in groups:
            here = group["params"]
            members = [here] if isinstance(here, Tensor) else list(here)
            short = [one for one in members if self.pure
                     and (one[1] if isinstance(one, tuple) else one).dtype == self.dtype]
            chosen = {id(one) for one in short}
            rest = [one for one in members if id(one) not in chosen]
            made += [{**group, "params": some, **options} for some, options in
                     ((short, self.optimizer_options()), (rest, {})) if some]
        return made

    def scaler(self, **options: Any) -> LossScaler | None:
        """A `fasttrain.LossScaler` where gradients pass through fp16, in which they are zero below 3e-8; else None.

        Arguments:
            options: of the `LossScaler`.
        """
        return LossScaler(**options) if self.dtype == torch.float16 else None

    # --- What fits together -------------------------------------------------------------------------------------------

    def check(self, model: nn.Module | None = None, optimizer: Any = None) -> None:
        """Refuse a model or optimizer that this precision would quietly train worse, or not at all.

        Raises:
            ValueError: parameters were cast that should not have been, or not cast; or have no master.
            TypeError: an optimizer that cannot keep masters, or not skip.
        """
        if model is not None:
            self._check_model(model)
        if optimizer is not None:
            self._check_optimizer(optimizer)

    def _check_model(self, model: nn.Module) -> None:
        short = [name for name, p in model.named_parameters() if p.dtype in SHORT]
        wrong = [name for name, p in model.named_parameters() if p.dtype in SHORT and p.dtype != self.dtype]
        if short and not self.pure:
            raise ValueError(f"precision {self.name!r} has fp32 parameters, and {_some(short)} "
                             f"{'is' if len(short) == 1 else 'are'} not: updates below their last digit would be lost. "
                             "Leave the model in fp32, or use 'bf16-pure' or 'fp16-pure', which keep masters")
        if self.pure and (wrong or not short):
            raise ValueError(f"precision {self.name!r} has {_called(self.dtype)} parameters, and "
                             f"{_some(wrong) if wrong else 'none'} of this model {'are not' if wrong else 'is one'}: "
                             "call cast(model) on a model in fp32, before the optimizer is made")

    def _check_optimizer(self, optimizer: Any) -> None:
        ours = hasattr(optimizer, "step_scaled") and getattr(optimizer, "_pattern", True) is not None
        kind = type(optimizer).__name__
        params = [(group, p) for group in optimizer.param_groups for p in group["params"]]
        if self.pure:
            if not ours:
                raise TypeError(f"precision {self.name!r} with {type(optimizer).__module__}.{kind}, which keeps no "
                                "masters: small updates would be lost. Use the optimizer of that name from "
                                "fasttrain.optim")
            if any(p.dtype in SHORT and group.get("master", "none") == "none" for group, p in params):
                raise ValueError(f"precision {self.name!r}: the optimizer keeps no masters of {_called(self.dtype)} "
                                 f"parameters: give it master={self.master!r}, or precision.groups(...) as its "
                                 "parameters")
        elif any(p.dtype in SHORT for _, p in params):
            raise ValueError(f"precision {self.name!r} has fp32 parameters, and the optimizer has some that are not")
        if self.dtype == torch.float16:
            if not ours:
                raise TypeError(f"precision {self.name!r} needs steps that a loss scale can skip, and "
                                f"{type(optimizer).__module__}.{kind} has none for fasttrain.LossScaler: use the "
                                "optimizer of that name from fasttrain.optim, or torch.amp.GradScaler in your own loop")
            if getattr(optimizer, "arriving", None) is not None:
                raise ValueError(f"precision {self.name!r} scales the loss, and parameters are stepped as their "
                                 "gradients arrive (step_on_arrival), before anything could be skipped: remove() that, "
                                 "or use bf16")

    # --- What is told -------------------------------------------------------------------------------------------------

    def kept(self, model: nn.Module) -> dict[str, list[str]]:
        """The parameters and buffers of a model that are fp32 or wider, by kind.

        Example:
            >>> Precision("fp32").kept(nn.Linear(1, 1))
            {'parameters': ['weight', 'bias'], 'buffers': []}
        """
        return {kind: [name for name, tensor in named if tensor.is_floating_point() and tensor.dtype not in SHORT]
                for kind, named in (("parameters", model.named_parameters()), ("buffers", model.named_buffers()))}

    def describe(self, model: nn.Module) -> str:
        """What a run should print: in what it computes, and what is kept in fp32."""
        counts = [p.numel() for p in model.parameters()]
        short = sum(p.numel() for p in model.parameters() if p.dtype in SHORT)
        scale = "a loss scale" if self.dtype == torch.float16 else "no loss scale"
        first = (f"{self.name} on {self.device}: computes in {_called(self.dtype)}, {short:,} of {sum(counts):,} "
                 f"parameters are {_called(self.dtype) if self.pure else '16-bit'}, {scale}.")
        kept = self.kept(model)
        if not self.pure:
            autocast = "" if self.dtype == torch.float32 else ", and what autocast keeps (norms, softmax, losses)"
            return f"{first}\nKept in fp32: all parameters, gradients and states of the optimizer{autocast}."
        names = [f"{kind} {_some(those)}" for kind, those in kept.items() if those]
        rest = (f"masters (master={self.master!r}),\nstates of the optimizer, its average (ema_decay) and the norm "
                "of the gradients")
        return f"{first}\nKept in fp32: {'; '.join([*names, rest])}."


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
