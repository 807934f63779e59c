"""``make proof``: measure every kernel again, and write benchmarks/results/kernels.json and both pages of docs.

    python -m benchmarks.proof [list] [cuda] [triton] [pages]     all by default; cuda reads step.fatbin as it is built

What the compilers here cannot measure stays as it was. Differences are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.proof import cases, disassembly, table
from fasttrain.kernels import cuda as backend

DOCS = Path(__file__).parents[2] / "docs"
PARTS = ("list", "cuda", "triton", "pages")


def cuda() -> None:
    """The rows of the fatbin."""
    from benchmarks.proof import cuda, paths

    if not backend.IMAGE.is_file():
        return print(f"cuda: kept as it was, for there is no {backend.IMAGE}: build it (make install, with nvcc)")
    keep("cuda", cuda.compiler(), cuda.rows(paths.compiled(backend.IMAGE)))
    return None


def triton() -> None:
    """The rows of what Triton compiles."""
    from benchmarks.proof import triton

    keep("triton", triton.compiler(), {made.of.name: made.row() for made in triton.make_all(triton.listed().values())})


def keep(name: str, compiler: str, rows: table.Rows) -> None:
    """Write rows, and say what became different."""
    changed = table.differences(name, compiler, rows)
    table.save(name, compiler, rows)
    print("\n".join(changed if changed is not None else []), end="\n" * bool(changed))
    print(f"{name}: {len(rows)} kernels by {compiler}; "
          + ("of other compilers before" if changed is None else f"{len(changed)} differences"))


def pages() -> dict[Path, str]:
    """Both documents, as they should be."""
    from benchmarks.proof import cuda, triton_page

    return {DOCS / "gpu-kernels.md": cuda.page(*table.newest("cuda")),
            DOCS / "triton-kernels.md": triton_page.page(*table.newest("triton"))}


def main(parts: list[str]) -> int:
    if unknown := set(parts) - set(PARTS):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if disassembly.cuobjdump() is None:
        print("no cuobjdump: install triton, or put the CUDA toolkit's on PATH", file=sys.stderr)
        return 2
    wanted = parts or list(PARTS)
    if "list" in wanted:
        cases.LIST.write_text("".join(f"{case}\n" for case in cases.covering()))
    for name, measure in (("cuda", cuda), ("triton", triton)):
        if name in wanted:
            measure()
    if "pages" in wanted:
        for path, text in pages().items():
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
