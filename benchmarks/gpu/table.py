"""Figures as text: the short table that the command ends with, and the README's, with what was not measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

NOT_MEASURED = "not measured yet"


class Aim(NamedTuple):
    """A row that the README shows whether it was measured or not.

    Attributes:
        section: of the figures.
        part: what their names contain.
    """

    section: str
    work: str
    aim: str
    part: str = ""


AIMS = (
    Aim("ceiling", "copy on the device, read plus written", "the ceiling"),
    Aim("adamw", "AdamW fp32, 1e9 in 300 tensors, 28 B", "92% of copy, never below torch fused"),
    Aim("whole", "unscale + inf check + clip + AdamW + zero, fp32, 1e9, 36 B", "1.45x the torch recipe (52 B)"),
    Aim("split", "clip + AdamW, bf16 with exact master, fp32 states, 28 B", "90%, 1.6x fp32 masters with torch fused"),
    Aim("coded", "clip + AdamW, split master, int8 states, 16 B", "80%, faster than other 8-bit optimizers"),
    *(Aim("shapes", f"all four on the shapes of {model}", "as above", model)
      for model in ("GPT-2 124M", "Llama-3-8B", "ResNet-50", "64 experts")),
    Aim("small", "10,000 tensors of 1,000", "5x torch fused; one launch"),
    *(Aim("host", f"host time, {count} {kind}", f"{limit} us", f"{count} {kind}")
      for count, kind, limit in (("150", "parameters", "250"), ("10,000", "parameters", "10,100"),
                                 ("150", "DTensors", "400"), ("10,000", "DTensors", "20,100"))),
    Aim("host", "host time, gradients in buckets", "100 us", "in buckets"),
    Aim("ema", "AdamW + EMA, fp32", "adds at most 50% of what `_foreach_lerp_` adds"),
    Aim("muon", "Muon, GPT-2 124M", "1.3x torch.optim.Muon", "GPT-2 124M"),
    Aim("muon", "Muon, 1B", "1.3x torch.optim.Muon", "of 1B"),
    Aim("offload", "AdamW, bf16, states on the host", "time and GPU memory beside torchao's"),
    Aim("around", "norm and non-finite flag, 4 B", "as near the copy as the step", "norm"),
    Aim("around", "gradients packed into a bf16 bucket, 6 B", "as near the copy as the step", "pack"),
    Aim("end to end", "GPT-2 124M end to end, bf16", "tokens/s, MFU, peak memory beside torch's recipe"),
    Aim("end to end", "the same, whole step in one CUDA graph", "stated", "CUDA graph"),
    *(Aim("start", f"import to first step, {how}", "stated", how)
      for how in ("compiled ahead of time", "NVRTC, cold", "NVRTC, cached", "Triton, cold", "Triton, cached")),
)


def number(value: float) -> str:
    """Three digits that matter, and no exponent.

    >>> number(6.5432), number(12.34), number(12345.6), number(0.04)
    ('6.54', '12.3', '12,346', '0.040')
    """
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def cells(row: dict[str, Any]) -> tuple[str, str, str]:
    """Ours (or the only value) with its unit, % of copy, and ratios to the others."""
    name = "fasttrain" if "fasttrain" in row["value"] else next(iter(row["value"]))
    spread = f" ±{row['spread']:.1%}" if "spread" in row else ""
    own = f"{number(row['value'][name])} {row['unit']}{spread}"
    ratios = ", ".join(f"{other} {ratio['median']:.2f}x" for other, ratio in row.get("ratio", {}).items())
    return own, f"{row['of_copy']:.0%}" if "of_copy" in row else "", ratios


def short(rows: Iterable[dict[str, Any]], cut: dict[str, str], failed: dict[str, str]) -> str:
    """One line for each work: ours, % of copy, how many times as long the others take."""
    lines = [f"{'work':64} {'ours':>22} {'% of copy':>9}  the others' time over ours"]
    for row in rows:
        own, of_copy, ratios = cells(row)
        lines.append(f"{row['work']:64} {own:>22} {of_copy:>9}  {'; '.join(filter(None, (ratios, row.get('note'))))}")
    lines += [f"{work:64} {why}" for work, why in cut.items()]
    lines += [f"{work:64} FAILED: {why.splitlines()[0][:120]}" for work, why in failed.items()]
    return "\n".join(lines)


def absences(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    """What could not be compared with, and why, each once."""
    found: dict[str, str] = {}
    for row in rows:
        found |= row.get("absent", {})
    return found


def chosen(aim: Aim, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of a row."""
    return [row for row in rows if row["section"] == aim.section and aim.part in row["work"]]


def page(results: dict[str, Any] | None) -> list[str]:
    """The README's lines.

    Arguments:
        results: of the newest file; None if there is none.
    """
    rows = results["figures"]["rows"] if results else []
    head = [NOT_MEASURED[0].upper() + NOT_MEASURED[1:] + ": no GPU has run `make gpu` so far."]
    if results:
        machine = results["machine"]
        packages = machine.get("packages", {})
        head = [f"{machine['gpu']}, driver {machine['driver']}, torch {packages.get('torch', '?')}, "
                f"triton {packages.get('triton', 'none')}, commit {machine['commit']}, {machine['date'][:10]}; rivals "
                "in turn in one run, medians; ± is how far the same version was from itself."]
        missing = sorted(name for name in absences(rows))
        head += ["", f"Not there to compare with: {', '.join(missing)}."] if missing else []
    lines = [*head, "", "| work | aim | measured | ours | % of copy | the others' time over ours |",
             "|---|---|---|---|---|---|"]
    for aim in AIMS:
        found = chosen(aim, rows)
        if not found:
            lines.append(f"| {aim.work} | {aim.aim} | {NOT_MEASURED} | | | |")
        for row in found:
            own, of_copy, ratios = cells(row)
            notes = "; ".join(filter(None, (ratios, row.get("note"))))
            lines.append(f"| {aim.work} | {aim.aim} | {row['work']} | {own} | {of_copy} | {notes} |")
    return lines
