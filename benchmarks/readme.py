"""Draw the newest figures, and write them into the README between its marks: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.gpu import table
from benchmarks.harness import RESULTS

README = Path(__file__).parents[1] / "README.md"


def newest(suite: str) -> dict[str, Any]:
    """The last results of a suite."""
    return json.loads(max(RESULTS.glob(f"*-{suite}.json")).read_text())


def around_the_step() -> list[str]:
    """What a step takes in beside the update, and every optimizer of torch."""
    rows, optimizers = newest("pass")["figures"], newest("optimizers")["figures"]
    of = rows[0].get("of", "66M elements in 1,000 tensors")  # files of before 2026-11-23 do not say it
    lines = ["", f"| {of} | against | bytes | ratio | quartiles | aim | of bandwidth |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = row["ratio"]
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        lines.append(f"| {row['work']} | {row['peer']} | {row['bytes']} | **{ratio['median']:.2f}x** | {spread} "
                     f"| {row['aim']}x | {row['of_ceiling']:.0%} |")
    lines += ["", "Bytes are those that a step must move for each element; the bandwidth is that of the ceiling.", "",
              f"| optimizer, fp32, {sizes_of(optimizers)} | ours | torch's best | ratio | quartiles |",
             "|---|---|---|---|---|"]
    for row in optimizers:
        seconds, ratio = row["seconds"], row["ratio"]
        lines.append(f"| {row['work'].split(',')[0]} | {seconds['fasttrain'] * 1e3:.1f} ms "
                     f"| {seconds[row['best']] * 1e3:.1f} ms ({row['best'].removeprefix('torch').strip() or 'single'}) "
                     f"| **{ratio['median']:.2f}x** | {ratio['low']:.2f} to {ratio['high']:.2f} |")
    return lines


def sizes_of(optimizers: list[dict[str, Any]]) -> str:
    """What the optimizers were measured on, as their rows say it."""
    sizes = {row["work"].split(", ")[0]: row["work"].split(", ")[1] for row in optimizers}
    tensors, *shape = map(int, sizes["AdamW"].split(" x "))
    return f"{tensors * math.prod(shape) / 1e6:.0f}M elements in {tensors} tensors (Muon: {sizes['Muon']})"


def newest_on_gpu() -> dict[str, Any] | None:
    """The last results of `make gpu`; None if there are none."""
    return newest("gpu") if any(RESULTS.glob("*-gpu.json")) else None


def on_gpu(results: dict[str, Any] | None) -> str:
    """The section on GPUs."""
    lines = table.page(results)
    if results and plot.RESULTS.joinpath("gpu.svg").is_file():
        lines += ["", "![share of the copy's speed](benchmarks/results/gpu.svg)"]
    return "\n".join([*lines, "", "`make gpu` measures them ([docs/gpu.md](docs/gpu.md))."])


def figures() -> str:
    """The tables."""
    step, loop, host, added = (newest(suite) for suite in ("step", "loop", "host", "import"))
    machine = step["machine"]
    lines = [
        f"CPU, {machine['threads']} cores of an {machine['processor']} ({machine['isa']}), "
        f"torch {machine['torch']}, "
        f"{machine['date']}; rivals in turn in one run, medians. The machine is shared: read the ratios, with their "
        "quartiles; its memory was up to 1.6 times as fast in some runs, which moves them.",
        "",
        "| AdamW step, fp32: tensors x elements | fasttrain | torch fused | ratio | quartiles | aim | of the ceiling |",
        "|---|---|---|---|---|---|---|"]
    for row in step["figures"]:
        seconds, ratio, ceiling = row["seconds"], row["ratio"], row["of_ceiling"]
        lines.append(f"| {row['work'].removeprefix('AdamW fp32, ')} | {seconds['fasttrain'] * 1e3:.2f} ms "
                     f"| {seconds['torch fused'] * 1e3:.2f} ms | **{ratio['median']:.2f}x** "
                     f"| {ratio['low']:.2f} to {ratio['high']:.2f} | {row['aim']}x "
                     f"| {format(ceiling['median'], '.0%') if ceiling else ''} |")
    for row in loop["figures"]:
        seconds, ratio = row["seconds"], row["ratio"]
        lines.append(f"| {row['work'].removeprefix('AdamW fp32, ')} | {seconds['fasttrain'] * 1e3:.2f} ms "
                     f"| {seconds['torch fused'] * 1e3:.2f} ms | **{ratio['median']:.2f}x** "
                     f"| {ratio['low']:.2f} to {ratio['high']:.2f} | | |")
    lines += around_the_step()
    lines += ["", "The ceiling is an in-place update of as many streams in the same rounds: a step moves 28 bytes an "
              "element. Where torch is as fast, both wait for memory.",
              "",
              "| host time per parameter, us | fasttrain | torch fused | torch foreach "
              "| of it, `p.grad.data_ptr()` from Python |",
              "|---|---|---|---|---|"]
    remains = {row["parameters"]: row["remains"]["p.grad.data_ptr()"] for row in host["figures"] if "remains" in row}
    for row in host["figures"]:
        if "remains" not in row:
            us = row["us_per_parameter"]
            lines.append(f"| {row['parameters']:,} parameters, {'fresh' if row['fresh'] else 'the same'} gradients "
                         f"| {us['fasttrain']:.2f} | {us['torch fused']:.2f} | {us['torch foreach']:.2f} "
                         f"| {remains[row['parameters']]:.2f} |")
    adds = added["figures"][-1]["added"]
    lines += ["", f"`from fasttrain.optim import AdamW`, compiled module included, adds {adds:.2f} s to "
              "`import torch`.",
              "", "![ratios](benchmarks/results/step.svg)", "",
              "`make bench` measures them again; every run is kept under `benchmarks/results/`."]
    return "\n".join(lines)


def rewritten(page: str, mark: str, figures: str) -> str:
    """A page with the figures between the two marks of a name."""
    marks = re.compile(rf"(<!-- {mark} -->\n).*(<!-- /{mark} -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found.group(1)}{figures}\n{found.group(2)}", page)


def page(text: str) -> str:
    """The README with the newest figures in it."""
    return rewritten(rewritten(text, "figures", figures()), "gpu", on_gpu(newest_on_gpu()))


def main() -> None:
    plot.steps(newest("step")["figures"])
    plot.convergence(newest("convergence")["figures"])
    if results := newest_on_gpu():
        plot.gpu(results["figures"]["rows"])
    README.write_text(page(README.read_text()))


if __name__ == "__main__":
    main()
