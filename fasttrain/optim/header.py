"""Write `csrc/rules.h`, the C++ of every rule: ``python -m fasttrain.optim.header csrc/rules.h``."""

from __future__ import annotations

import sys
from pathlib import Path

from fasttrain.kernels.emit_cpp import header
from fasttrain.optim import COMMON_RULES, RULES


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise SystemExit("usage: python -m fasttrain.optim.header PATH")
    Path(arguments[0]).write_text(header(RULES, COMMON_RULES))


if __name__ == "__main__":
    main(sys.argv[1:])
