"""Write `csrc/rules.h`, the C++ of every rule, and beside it `stage_rules.h` and `cuda/coefficients.cuh`.

``python -m fasttrain.optim.header csrc/rules.h``
"""

from __future__ import annotations

import sys
from pathlib import Path

from fasttrain.kernels import emit_scalars
from fasttrain.kernels.emit_cpp import header, stages_header
from fasttrain.optim import COMMON_RULES, ELEMENTWISE_RULES, RULES, STAGES
from fasttrain.optim.structures import coefficient_graphs


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m fasttrain.optim.header PATH")
    path = Path(arguments[0])
    path.write_text(header(ELEMENTWISE_RULES, COMMON_RULES, RULES[len(ELEMENTWISE_RULES) :]))
    path.with_name("stage_rules.h").write_text(stages_header(STAGES))
    scalars = path.parent / "cuda" / "coefficients.cuh"
    scalars.parent.mkdir(exist_ok=True)
    scalars.write_text(emit_scalars.header(coefficient_graphs((*RULES, *STAGES))))


if __name__ == "__main__":
    main(sys.argv[1:])
