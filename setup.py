"""Builds the compiled part of fasttrain with CMake (see CMakeLists.txt); everything else is in pyproject.toml.

Without a C++ compiler the package installs as pure Python, and `fasttrain/_build_info.json` keeps the reason, which
`fasttrain doctor` shows (pip hides what a build prints). A compiler that rejects our code fails the build.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent
PROBE = "#include <Python.h>\n#include <thread>\nint probe() { return static_cast<int>(std::thread().joinable()); }\n"


def find_compiler() -> tuple[str, str]:
    """Return (compiler, "") for a C++17 compiler that can link a Python module, else ("", why there is none)."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((name for name in names if shutil.which(shlex.split(name)[0])), "")
    if not found:
        return "", f"no C++ compiler: {' or '.join(names)} not found on PATH. Install g++ or clang++ (or set CXX)"
    static = [] if sys.platform == "darwin" else ["-static-libstdc++", "-static-libgcc"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "probe.cpp")
        source.write_text(PROBE)
        command = [*shlex.split(found), "-std=c++17", "-shared", "-fPIC", *static, *undefined]
        command += ["-I", sysconfig.get_path("include"), str(source), "-o", str(source.with_suffix(".so"))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    if done.returncode == 0:
        return found, ""
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    error = next((line for line in lines if "error" in line or "cannot find" in line), lines[0])
    return "", f"{found} cannot build an empty Python module: {error.strip()}"


class CMakeBuild(build_ext):
    """`build_ext` that lets CMake build and install into the package's directory, in place or under build_lib."""

    def target(self) -> Path:
        return ROOT / "fasttrain" if self.inplace else Path(self.build_lib).resolve() / "fasttrain"

    def run(self) -> None:
        target = self.target()
        for old in [*target.glob("_native*.so"), target / "step.fatbin", target / "_build_info.json"]:
            old.unlink(missing_ok=True)  # nothing of an earlier build may stay beside this one
        target.mkdir(parents=True, exist_ok=True)
        compiler, reason = find_compiler()
        if compiler:
            self.run_cmake(compiler, target)
        elif os.environ.get("FASTTRAIN_CUDA") == "on":
            raise OptionError(f"FASTTRAIN_CUDA=on, but nothing can be compiled: {reason}")
        else:
            self.warn(f"installing as pure Python: {reason}")
            info = {"native": False, "reason": reason, "compiler": "", "isas": []}
            info |= {"cuda": [], "cuda_reason": "no compiled part", "nvcc": ""}
            (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def run_cmake(self, compiler: str, target: Path) -> None:
        """Configure, build (incrementally, in build/) and install into `target`."""
        path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
        tools = {name: shutil.which(name, path=path) for name in ("cmake", "ninja")}
        if missing := [name for name, found in tools.items() if not found]:
            remedy = f"{sys.executable} -m pip install {' '.join(missing)}"
            raise CompileError(f"{' and '.join(missing)} not found on PATH; install with: {remedy}")
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        work.mkdir(parents=True, exist_ok=True)
        # A cache made by other tools (build isolation makes new ones every time) names files that may be gone.
        configured = work / "configured_with.txt"
        key = f"{sys.executable}\n{compiler}\n{tools}\n{os.environ.get('PYTHONPATH')}\n"
        fresh = [] if configured.is_file() and configured.read_text() == key else ["--fresh"]
        configured.unlink(missing_ok=True)
        settings = [f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", f"-DPython_EXECUTABLE={sys.executable}"]
        steps = [
            [f"-S{ROOT}", f"-B{work}", "-GNinja", *fresh, *settings],
            ["--build", str(work)],
            ["--install", str(work), "--prefix", str(target)],
        ]
        for arguments in steps:
            command = [str(tools["cmake"]), *arguments]
            if status := subprocess.run(command, env={**os.environ, "CXX": compiler}).returncode:
                raise CompileError(f"{shlex.join(command)} failed with status {status}; its first error is above")
        configured.write_text(key)

    def get_outputs(self) -> list[str]:
        package = self.target()
        built = [*package.glob("_native*.so"), package / "step.fatbin", package / "_build_info.json"]
        return [str(path) for path in built if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in place, CMake installs beside the sources: there is nothing to copy


setup(
    packages=[*find_packages(include=["fasttrain", "fasttrain.*"]), "fasttrain._csrc"],
    package_dir={"fasttrain._csrc": "csrc"},  # the kernels' sources, for compiling at run time
    package_data={
        "fasttrain": ["py.typed"],
        "fasttrain._csrc": [f"{where}*.{suffix}" for where in ("", "*/") for suffix in ("h", "cpp", "cuh", "cu")],
    },
    include_package_data=False,
    ext_modules=[Extension("fasttrain._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
