"""What the compiled module is made of: instruction sets kept apart, nothing linked that a user may not have."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import fasttrain

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fasttrain.__file__).parent
# Bytes: 37 rules and stages in fp32 and fp64, every codec, and buckets, for three instruction sets; and 1.1 MB of
# device functions compiled for the host, which are what proves them without a GPU.
LARGEST_MODULE = 17 << 18
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|librt|ld-linux[-\w]*)\.so\.\d+")


@pytest.fixture(scope="module")
def module() -> Path:
    spec = importlib.util.find_spec("fasttrain._native")
    if spec is None or spec.origin is None:
        info = PACKAGE / "_build_info.json"
        pytest.skip(f"no compiled part: {json.loads(info.read_text())['reason'] if info.is_file() else 'never built'}")
    if not sys.platform.startswith("linux"):
        pytest.skip(f"reads ELF files, and {sys.platform} has none")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def info(module: Path) -> dict:
    return json.loads((PACKAGE / "_build_info.json").read_text())


def tool(name: str, *arguments: object) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@cache
def disassembly(module: Path) -> dict[str, list[str]]:
    """Return every function of the module, demangled, with its instructions."""
    functions: dict[str, list[str]] = defaultdict(list)
    name = ""
    for line in tool("objdump", "-d", "-C", "--no-show-raw-insn", module).splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            name = head[1]
        elif ":\t" in line:
            functions[name].append(line.split(":\t", 1)[1])
    return functions


def instructions(module: Path, isa: str) -> list[str]:
    found = [line for name, lines in disassembly(module).items() if f"fasttrain::{isa}::" in name for line in lines]
    assert found, f"no function of namespace fasttrain::{isa} in {module}: was it stripped?"
    return found


def test_old_processors_meet_no_avx(module: Path, info: dict) -> None:
    if "baseline" not in info["isas"]:
        pytest.skip(f"instruction sets {info['isas']}: there is nothing to keep apart")
    assert instructions(module, "baseline")
    newer = re.compile(r"fasttrain::(avx2|avx512)::")
    avx = re.compile(r"v(?!err |erw )[a-z]|.*%[yz]mm")
    met = {
        f"{name}: {line}"
        for name, lines in disassembly(module).items()
        if not newer.search(name)
        for line in lines
        if avx.match(line)
    }
    assert not met, "\n".join(sorted(met)[:20])


def test_each_instruction_set_is_used(module: Path, info: dict) -> None:
    if "avx2" not in info["isas"]:
        pytest.skip(f"instruction sets {info['isas']}: no AVX in them")
    avx2, avx512 = (" ".join(instructions(module, isa)) for isa in ("avx2", "avx512"))
    assert "%ymm" in avx2
    assert "%zmm" not in avx2
    assert "%zmm" in avx512


def test_no_contraction(module: Path, info: dict) -> None:
    lines = (line for isa in info["isas"] for line in instructions(module, isa))
    fused = {line.split()[0] for line in lines if re.match(r"vfn?m(add|sub)|fn?m(add|sub|la|ls)", line)}
    assert not fused, f"{sorted(fused)}: -ffp-contract=off did not reach the compiler"


def test_instruction_sets_share_no_function(module: Path, info: dict) -> None:
    for isa in info["isas"]:
        builds = list((ROOT / "build").glob(f"*/CMakeFiles/step_{isa}.dir/csrc/cpu/step.cpp.o"))
        if not builds:
            pytest.skip("the module was built elsewhere: there are no object files to look at")
        built = max(builds, key=lambda path: path.stat().st_mtime)
        symbols = (line.split(maxsplit=2)[1:] for line in tool("nm", "-C", "--defined-only", built).splitlines())
        shared = [name for kind, name in symbols if kind in "TWVuBDRC" and f"fasttrain::{isa}::" not in name]
        assert not shared, f"{isa}: the linker keeps one copy for all instruction sets of {shared}"


def test_links_only_the_system(module: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", module))
    assert needed
    assert not [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)]
    undefined = tool("nm", "-D", "-C", "--undefined-only", module)
    assert not re.findall(r".*\b(?:cu[A-Z]\w*|cuda\w*|c10::.*|at::.*|torch::.*|nvrtc\w*)", undefined)


def test_exports_one_symbol(module: Path) -> None:
    exported = [line.split()[-1] for line in tool("nm", "-D", "--defined-only", module).splitlines()]
    assert exported == ["PyInit__native"]


def test_size(module: Path) -> None:
    assert module.stat().st_size <= LARGEST_MODULE


def test_imports_without_torch_and_driver(module: Path) -> None:
    code = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('fasttrain._native', {str(module)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert 'libcuda' not in pathlib.Path('/proc/self/maps').read_text()\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_device_code(info: dict) -> None:
    fatbin = PACKAGE / "step.fatbin"
    if not info["cuda"]:
        assert not fatbin.exists()
        pytest.skip(f"no device code: {info['cuda_reason']}")
    assert fatbin.read_bytes()[:4] == bytes.fromhex("50ed55ba")  # a fat binary
    assert {"sm_80", "sm_90", "compute_80"} <= set(info["cuda"]), info["cuda_reason"]
