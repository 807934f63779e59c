"""Fresh environments in seconds: torch is linked into them, and compilers do nothing twice.

What is installed and built here is the package; torch was installed, and the same sources were compiled with every
optimization, to get this far.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("setuptools", "cmake", "ninja", "pybind11")  # what a build without isolation needs


def closure(names: Iterable[str]) -> set[str]:
    """These packages and all that they need, of those that are installed; extras are left out."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform or Python
            continue
        found.add(name)
        left += [re.match(r"[\w.-]+", need).group() for need in needs if "extra ==" not in need]
    return found


def environment(where: Path, names: Iterable[str]) -> Path:
    """Make an environment with pip; link those packages, of this one's, and what they need. Returns its Python."""
    venv.create(where, with_pip=True)
    python = where / "bin" / "python"
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *names], check=True)  # Python 3.11 brings setuptools
    (site,) = (where / "lib").glob("python*/site-packages")
    for name in closure(names):
        package = distribution(name)
        here = Path(str(package.locate_file("")))
        for file in package.files or []:
            target = file.parts[0] if file.parts[0] != ".." else ""
            to = site / target
            if file.parent.name == "bin" and not target:
                target, to = str(file), python.with_name(file.name)
            if target and target != "__pycache__" and not to.exists():
                to.symlink_to((here / target).resolve())
    return python


def script(to: Path, text: str) -> Path:
    to.write_text(f"#!{sys.executable}\n{text}")
    to.chmod(to.stat().st_mode | stat.S_IXUSR)
    return to


CXX = """
import hashlib, os, pathlib, shutil, subprocess, sys
compiler, kept, arguments = {compiler!r}, pathlib.Path({kept!r}), sys.argv[1:]
if not {{"-c", "-o"}} <= set(arguments):
    os.execvp(compiler, [compiler, *arguments])
at = arguments.index("-o")
out, rest = arguments[at + 1], [*arguments[:at], *arguments[at + 2:]]
whole = ["-E", "-P", "-Wno-builtin-macro-redefined", '-D__FILE__=""']  # pybind11 lies elsewhere in each build
read = subprocess.run([compiler, *(each for each in rest if each != "-c"), *whole], stdout=subprocess.PIPE)
if read.returncode:
    sys.exit(read.returncode)
flags = [each for each in rest if each.startswith("-") and not each.startswith(("-I", "-isystem", "-M"))]
known = kept / hashlib.sha256("\\0".join(flags).encode() + b"\\0" + read.stdout).hexdigest()
if not known.exists():
    done = subprocess.run([compiler, *arguments, "-O0"])
    if done.returncode:
        sys.exit(done.returncode)
    shutil.copy(out, known)
shutil.copy(known, out)
"""


def compiler(folder: Path) -> str:
    """A script in the place of g++, without optimization: what it compiled once, in whatever folder, is copied."""
    kept = folder / "objects"
    kept.mkdir(parents=True)
    found = next(name for name in ("c++", "g++", "clang++") if shutil.which(name))
    return str(script(folder / "compiler", CXX.format(compiler=found, kept=str(kept))))


NVCC = """
import os, shutil, sys
nvcc, arguments = {nvcc!r}, sys.argv[1:]
if "-fatbin" not in arguments:
    os.execv(nvcc, [nvcc, *arguments])
out, dependencies = (arguments[arguments.index(name) + 1] for name in ("-o", "-MF"))
shutil.copy({image!r}, out)
open(dependencies, "w").write(f"{{out}}: {{arguments[-1]}}\\n")
"""


def nvcc(folder: Path) -> str:
    """A script in the place of nvcc that answers with the device code of this build; nvcc itself where it has none."""
    found = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])) or ""
    image = ROOT / "fasttrain" / "step.fatbin"
    if not found or not image.is_file():
        return found
    return str(script(folder / "nvcc", NVCC.format(nvcc=found, image=str(image))))
