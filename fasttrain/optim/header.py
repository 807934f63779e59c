"""Write `csrc/rules.h`, the C++ of every rule, and beside it `stage_rules.h`.

``python -m fasttrain.optim.header csrc/rules.h``
"""

from __future__ import annotations

import sys
from pathlib import Path

from fasttrain.kernels.emit_cpp import header, stages_header
from fasttrain.optim import COMMON_RULES, ELEMENTWISE_RULES, RULES, STAGES


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m fasttrain.optim.header PATH")
    path = Path(arguments[0])
    path.write_text(header(ELEMENTWISE_RULES, COMMON_RULES, RULES[len(ELEMENTWISE_RULES) :]))
    path.with_name("stage_rules.h").write_text(stages_header(STAGES))


if __name__ == "__main__":
    main(sys.argv[1:])
