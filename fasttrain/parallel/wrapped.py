"""Names of tensors in the original model, whatever is wrapped around it: the one place where prefixes are taken off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from fasttrain.parallel.data import DataParallel

WRAPPERS = (DataParallel, nn.parallel.DistributedDataParallel, nn.DataParallel)  # hold the model as `module`
RESERVED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # nobody else has modules of these names


def bare(model: nn.Module) -> nn.Module:
    """The model without what is wrapped around it as a whole: data parallelism, `torch.compile`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> bare(nn.DataParallel(model)) is model
        True
    """
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def strip(name: str) -> str:
    """A name without the prefixes that wrappers put into it, as far as a name alone tells.

    Example:
        >>> strip("module._orig_mod.blocks.0._checkpoint_wrapped_module.weight")
        'blocks.0.weight'
    """
    parts = [part for part in name.split(".") if part not in RESERVED]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def names_in(model: nn.Module, entries: Iterable[str]) -> dict[str, str]:
    """The names in the original model of some tensors of the bare one.

    Arguments:
        model: without what is wrapped around it as a whole (`bare`).
        entries: of its state dict.

    Raises:
        ValueError: two of them have one name, without their wrappers.
    """
    inside = inside_of(model)
    found = {name: clean_name(name, inside) for name in entries}
    seen: dict[str, str] = {}
    for name, clean in found.items():
        if clean in seen:
            raise ValueError(f"{seen[clean]} and {name} are both {clean!r} without their wrappers: rename one")
        seen[clean] = name
    return found


def inside_of(model: nn.Module) -> list[str]:
    """Where wrappers inside a model hold what they wrap, innermost first."""
    found = [f"{path}.module" if path else "module" for path, part in model.named_modules(remove_duplicate=False)
             if isinstance(part, WRAPPERS)]
    return sorted(found, key=len, reverse=True)


def clean_name(name: str, inside: Sequence[str]) -> str:
    for path in inside:
        if name.startswith(f"{path}."):
            name = path.removesuffix("module").removesuffix(".") + name[len(path):]
            name = name.removeprefix(".")
    if any(part in name for part in RESERVED):
        return ".".join(part for part in name.split(".") if part not in RESERVED)
    return name
