"""``python -m fasttrain`` is the ``fasttrain`` command."""

import sys

from fasttrain.cli import main

sys.exit(main())
