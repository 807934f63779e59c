"""The checkpoints of a run: saved beside the training, kept, and loaded."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fasttrain import __version__
from fasttrain.checkpoint import loading
from fasttrain.checkpoint import state as whole
from fasttrain.checkpoint.commit import publish
from fasttrain.checkpoint.errors import CheckpointError
from fasttrain.checkpoint.find import leftovers, step_name
from fasttrain.checkpoint.loading import Loaded
from fasttrain.checkpoint.lock import Lock
from fasttrain.checkpoint.parts import Among
from fasttrain.checkpoint.staging import Staged, Staging, live
from fasttrain.checkpoint.write import write_rank
from fasttrain.dist.wire import Wire

Record = dict[str, Any]
