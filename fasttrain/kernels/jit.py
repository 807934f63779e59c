"""Rules that are not in the compiled module: printed as C++, compiled by the system's compiler, kept on disk, loaded.

A rule becomes a shared object of a few lines around the very template of the compiled rules (csrc/cpu/step_kernel.h),
with the flags that the build recorded for the instruction set in use. What is kept on disk is found by a hash of all
that could change it, and the module refuses what was made for another build.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fasttrain
from fasttrain.kernels import cache as files
from fasttrain.kernels.emit_cpp import digest, struct
from fasttrain.rule import Rule

PATIENCE = 300  # seconds that a compiler may take
FRONT = """\
#include "cpu/on_demand.h"
#include "cpu/step_kernel.h"
#define FT_HEADERS "{headers}"

namespace fasttrain {{
namespace own {{

{struct}
}}  // namespace own
}}  // namespace fasttrain

FT_EXPORT_RULE({name})
"""

lock = threading.Lock()
known: dict[str, tuple[int | None, str]] = {}  # by source: two rules of one text are one


class Unavailable(Exception):
    """Why a rule cannot be compiled here."""


def load(rule: Rule, module: Any, info: Mapping[str, Any]) -> tuple[int | None, str]:
    """The number of a rule in the compiled module, or None and why it cannot be compiled. Each is tried once.

    Arguments:
        module: the compiled module.
        info: what its build recorded.

    Raises:
        ValueError: FASTTRAIN_JIT is neither on nor off.
    """
    if not wanted():
        return None, "FASTTRAIN_JIT=off"
    text = FRONT.format(headers=module.headers(), struct=struct(rule), name=rule.name)
    with lock:
        if text not in known:
            try:
                known[text] = (_load(rule, text, module, info), "")
            except (Unavailable, OSError) as error:
                known[text] = (None, str(error))
        return known[text]


def wanted() -> bool:
    """Whether rules are compiled on demand."""
    setting = os.environ.get("FASTTRAIN_JIT") or "on"
    if setting not in ("on", "off"):
        raise ValueError(f"FASTTRAIN_JIT is {setting!r}, which is neither on nor off. Set one of these, or unset it "
                         "(on)")
    return setting == "on"


def _load(rule: Rule, text: str, module: Any, info: Mapping[str, Any]) -> int:
    compiler, identity = find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))
    where = sources(module, info)
    if not rule.name.isidentifier():
        raise Unavailable(f"the rule's name {rule.name!r} is not an identifier: choose another one")
    command = [*compiler, *info["flags"][module.isa()], "-w", f"-I{where}", "-x", "c++", "-shared", *linked()]
    # `text` holds the rule with its digest, and the hash of the headers. Where they lie does not matter.
    key = json.dumps([fasttrain.__version__, text, identity, [part for part in command if part != f"-I{where}"]])
    name = f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:40]}.so"
    kept = files.get(name)
    if kept is not None:
        try:
            return module.load_rule(str(kept), rule.name, digest(rule))
        except RuntimeError:
            pass  # whole, and yet not to be loaded: made by a compiler that has since been repaired, perhaps
    try:
        return module.load_rule(str(files.put(name, compiled(command, text))), rule.name, digest(rule))
    except RuntimeError as error:
        raise Unavailable(f"what {compiler[0]} made was refused: {error}") from None


@cache
def find_compiler(chosen: str, path: str) -> tuple[list[str], str]:
    """The command of the C++ compiler, and what tells it from others. `chosen` is $CXX, `path` is $PATH.

    Raises:
        Unavailable: there is none, or it does not say its version.
    """
    names = [chosen] if chosen else ["c++", "g++", "clang++"]
    command = next((split for split in map(shlex.split, names) if split and shutil.which(split[0], path=path)), None)
    if command is None:
        tried = " or ".join(names)
        raise Unavailable(f"no C++ compiler: {tried} not found on PATH. Install g++ or clang++ (or set CXX)")
    program = Path(shutil.which(command[0], path=path) or "").resolve()
    file = program.stat()
    version = run([*command, "--version"])
    return command, f"{program} {file.st_size} {file.st_mtime_ns}\n{version}"


def sources(module: Any, info: Mapping[str, Any]) -> Path:
    """The directory of the headers: in the package where it was installed, beside it in a clone.

    Raises:
        Unavailable: they are not there, or not those that the module was built with.
    """
    where = folder()
    hashes = (f"{hashlib.sha256(path.read_bytes()).hexdigest()} {name}\n"
              for name in info["headers"] if (path := where / name).is_file())
    if hashlib.sha256("".join(hashes).encode()).hexdigest() != module.headers():
        raise Unavailable(f"the headers in {where} are not those that the compiled module was built with: build it "
                          "again")
    return where


def folder() -> Path:
    """The directory of the headers, whatever they are.

    Raises:
        Unavailable: they are not there.
    """
    package = Path(fasttrain.__file__).parent
    for where in (package / "_csrc", package.parent / "csrc"):
        if (where / "cpu" / "step_kernel.h").is_file():
            return where
    raise Unavailable(f"the headers of fasttrain are neither in {package / '_csrc'} nor in {package.parent / 'csrc'}")


def linked() -> list[str]:
    """Nothing of the C++ library is used, so nothing of it is to be loaded."""
    return [] if sys.platform == "darwin" else ["-Wl,--as-needed"]


def compiled(command: list[str], text: str) -> bytes:
    """The shared object that a compiler makes of a text.

    Raises:
        Unavailable: it failed; the message has its first errors.
    """
    with tempfile.TemporaryDirectory(prefix="fasttrain-") as work:
        source, made = Path(work, "rule.cpp"), Path(work, "rule.so")
        source.write_text(text, encoding="utf-8")
        run([*command, "-o", str(made), str(source)])
        if not made.is_file():
            raise Unavailable(f"{command[0]} reported no error and made no file")
        return made.read_bytes()


def run(command: list[str]) -> str:
    """What a compiler prints.

    Raises:
        Unavailable: it failed or did not end.
    """
    what = f"{command[0]} --version" if command[-1] == "--version" else command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE,
                              stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{what} did not end within {PATIENCE} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in lines if "error" in line] or lines
        raise Unavailable(f"{what} failed: {' / '.join(line.strip() for line in errors[:3])}")
    return done.stdout
