"""docs/triton-kernels.md, from the rows of `benchmarks.proof.table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.proof.cases import Case
from benchmarks.proof.triton import wide_accesses

TEXT = """\
# The Triton kernels, as compiled

Written by `make proof` from benchmarks/results/kernels.json, which has what was compiled ahead of time; a test compiles
it again and compares the two where the compiler is the same. Compiler: {compiler}.

One launch steps every parameter of one rule and one combination of storages. The steps are a list (`covering.txt`) in
which every rule comes with every plain storage and on every architecture; every other storage with every layout and
on every architecture; and every rule with one of those at least. The full product of all of them is compiled by `make
test-all`. *Accesses* are the loads and stores of a thread on the aligned path, and *instructions* what is executed
there for an element, start and end of the program included, without the subroutines of rare values. *Code*: all
instructions of the kernel. *Occupancy*: the share of its threads that a multiprocessor holds. No kernel spills or uses
local memory, but for those of rules with three states and an EMA that are all fp16 rounded at random. The codes are
counted, not run.

| rule | p, g, states | sm | bytes | registers | occupancy | accesses of 16 bytes | instructions | code |
|---|---|---|---|---|---|---|---|---|
{plain}

Items that are not plain (S: rounded at random; states that are never negative have codes of their own). Layouts: what
the kernel does beside the step. Codes of one byte are read and written in 8 bytes, bytes of two codes in 4, of which a
thread has eight as of everything else; its stores count those that zero a gradient. Units of blocks come on top.

| rule | p, g, states | layout | sm | bytes | registers | occupancy | accesses of 16, 8, 4 bytes | instructions | code |
|---|---|---|---|---|---|---|---|---|---|
{kept}

Kernels with sums: `square` is a norm's first launch and `add_up` the second launch of whatever is summed; rules are
first stages; the others are Adafactor's. Storages are of what a kernel reads: p, g and states. What a stage does not
need is not loaded. *Accesses* as above, of one round of the walk, or of several where the compiler unrolled it.

| kernel | storages | sm | registers | shared | occupancy | accesses of 16 bytes | code |
|---|---|---|---|---|---|---|---|
{sums}

Buckets: what is moved into one or out of it (from, to, residual), and the sum of all ranks' chunks (from, to).

| kernel | sm | bytes | registers | occupancy | accesses of 16, 8 bytes | instructions | code |
|---|---|---|---|---|---|---|---|
{buckets}

Symmetric products (`fasttrain.kernels.triton_symmetric`). *Shared*: bytes of shared memory of a program. *Copies* go
from global to shared memory, 16 bytes each. *Tensor cores*: their instructions; float32 is multiplied without them.

| product | tiles | sm | registers | shared | occupancy | copies | tensor cores | code |
|---|---|---|---|---|---|---|---|---|
{products}

Cross-entropy (`fasttrain.kernels.triton_cross_entropy`): a program goes over a row in rounds of 2,048 logits.
*Accesses* are those of a whole row's code, *instructions* those of a round, for an element.

| pass | logits | sm | bytes | registers | shared | occupancy | accesses of 16 bytes | instructions | code |
|---|---|---|---|---|---|---|---|---|---|
{losses}

Rows by index (`fasttrain.kernels.triton_rows`), of mixtures of experts: a program goes over a row that it writes in
rounds of 1,024 columns; `combine_row` adds up two slots. *Accesses* as the compiler unrolled the rounds.

| kernel | rows | sm | registers | shared | occupancy | accesses of 16 bytes | code |
|---|---|---|---|---|---|---|---|
{rows}
"""


def page(compiler: str, rows: Mapping[str, Any]) -> str:
    """The document."""
    names = ("plain", "kept", "sums", "buckets", "products", "losses", "rows")
    parts: dict[str, list[str]] = {name: [] for name in names}
    for name, row in rows.items():
        kind, _, text = name.partition(" ")
        *said, arch = text.split(": ")
        arch = arch.removeprefix("sm_")
        common = [str(row["registers"]), f"{row['occupancy']:.0%}"]
        each = [f"{row['per_element']:.1f}", str(row["instructions"])] if row["per_element"] else []
        moved = f"{row['bytes']:.2f}".rstrip("0").rstrip(".") if row["bytes"] else ""
        if kind == "step":
            case = Case.parse(name)
            cells = [case.rule, case.storage.replace("+", " "), *([] if case.plain else [case.layout]), arch, moved]
            wanted = wide_accesses(case)
            both = zip(wanted["loads"].values(), wanted["stores"].values(), strict=True)
            cells += [*common, ", ".join(f"{loads} + {stores}" for loads, stores in both if loads), *each]
            parts["plain" if case.plain else "kept"].append(line(cells))
        elif kind in ("sums", "rows"):
            parts[kind].append(line([*said, arch, common[0], str(row["shared"]), common[1], accesses(row, "16"),
                                       str(row["instructions"])]))
        elif kind == "product":
            parts["products"].append(line([*said, arch, common[0], str(row["shared"]), common[1],
                                           str(sum(row["copies"].values())), str(row["cores"]),
                                           str(row["instructions"])]))
        elif kind == "loss":
            parts["losses"].append(line([*said, arch, moved, common[0], str(row["shared"]), common[1],
                                         accesses(row, "16"), *each]))
        else:
            parts["buckets"].append(line([f"{kind} {', '.join(said)}", arch, moved, *common,
                                          accesses(row, "16", "8"), *each]))
    return TEXT.format(compiler=compiler, **{name: "\n".join(lines) for name, lines in parts.items()})


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def accesses(row: Mapping[str, Any], *widths: str) -> str:
    """Loads + stores of the widths."""
    return ", ".join(f"{row['loads'].get(width, 0)} + {row['stores'].get(width, 0)}" for width in widths)
