"""Installing: sdist, wheel and editable, into fresh environments, with and without a compiler (make test-install).

The wheel, and the build without a compiler, are made under pip's build isolation, in whose environment there is no
torch: a build that imported it would fail. The others find what they need in their environment (tests/fresh.py).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import fresh
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STEP = """
import json, pathlib, torch, fasttrain
from fasttrain.optim import AdamW
p = torch.nn.Parameter(torch.ones(1000))
p.grad = torch.full_like(p, 0.5)
optimizer = AdamW([p], lr=0.1, weight_decay=0.0)
optimizer.step()
assert torch.allclose(p, torch.full_like(p, 0.9)), p
where = pathlib.Path(fasttrain.__file__).parent
info = json.loads((where / "_build_info.json").read_text())
info["where"] = str(where)
info["modules"] = [path.name for path in where.glob("_native*.so")]
print(json.dumps(info))
"""


OWN = """
import json, torch, warnings
from fasttrain.kernels import native
from fasttrain.optim import Optimizer
class Own(Optimizer):
    state = ()
    def coefficients(step, lr):
        return dict(rate=lr / step)
    def element(p, g, k):
        return p - k.rate * g
    def __init__(self, params, lr=0.5, **options):
        super().__init__(params, dict(lr=lr), **options)
p = torch.nn.Parameter(torch.ones(1000))
p.grad = torch.ones(1000)
with warnings.catch_warnings(record=True) as said:
    Own([p]).step()
assert torch.equal(p.data, torch.full((1000,), 0.5))
print(json.dumps([native.find(Own.rules[0])[0], [str(warning.message) for warning in said]]))
"""


Done = subprocess.CompletedProcess[str]
Env = Mapping[str, str]


def run(*command: object, env: Env = MappingProxyType({}), check: bool = True) -> Done:
    """Run from / with the given variables changed (an empty one is removed); the output is shown when it fails."""
    changed = {"FASTTRAIN_CUDA": "off", "CUDACXX": "", "CXX": "", "CXXFLAGS": "", "PYTHONPATH": "", **env}
    variables = {name: value for name, value in (os.environ | changed).items() if value}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd="/", env=variables)
    if check:
        assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources alone, as a clone would have them."""
    copy = tmp_path_factory.mktemp("tree") / "fasttrain-clone"
    made_here = {str(ROOT): {"build", "dist", "runs", ".git"}, str(ROOT / "fasttrain"): {"step.fatbin"}}
    made = shutil.ignore_patterns(".venv*", ".*_cache", "*.egg-info", "__pycache__", "_native*", "_build_info.json")
    shutil.copytree(ROOT, copy, ignore=lambda where, names: made(where, names) | made_here.get(where, set()))
    return copy


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    build = f"import os, setuptools.build_meta as b; os.chdir({str(tree)!r}); b.build_sdist('dist')"
    run(sys.executable, "-c", build)
    (made,) = (tree / "dist").glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def cxx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh.compiler(tmp_path_factory.mktemp("compiler"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, cxx: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, isolated; the one build here with device code where there is an nvcc."""
    into = tmp_path_factory.mktemp("wheel")
    env = {"FASTTRAIN_CUDA": "auto", "CUDACXX": fresh.nvcc(into), "CXX": cxx}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", into, sdist, env=env)
    (made,) = into.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that holds torch and what builds need."""
    return fresh.environment(tmp_path_factory.mktemp("venv"), ("torch", "numpy", *fresh.TOOLS))


@pytest.fixture
def no_compiler(python: Path, tmp_path: Path) -> dict[str, str]:
    """A PATH with Python and nothing else."""
    return {"PATH": str(python.parent)}


def install(python: Path, *what: object, env: Env = MappingProxyType({}), check: bool = True,
            isolated: bool = False) -> Done:
    """Install over what is there, dependencies left as they are."""
    options = ["--no-deps", "--force-reinstall", "--no-cache-dir"]
    if not isolated:
        options.append("--no-build-isolation")
    return run(python, "-m", "pip", "install", *options, *what, env=env, check=check)


def step(python: Path, env: Env = MappingProxyType({})) -> dict:
    """Take an optimizer step in that environment, ask its doctor, and return what it knows of its build."""
    info = json.loads(run(python, "-c", STEP, env=env).stdout)
    assert bool(info["modules"]) == info["native"]
    doctor = run(python.with_name("fasttrain"), "doctor", env=env).stdout
    assert info["reason"][:40] in doctor
    return info


def own_rule(python: Path, cache: Path, env: Env = MappingProxyType({})) -> tuple[int | None, list[str]]:
    """Step with a rule that is in no build: its number in the compiled module, and what was said."""
    return json.loads(run(python, "-c", OWN, env={**env, "FASTTRAIN_CACHE_DIR": str(cache)}).stdout)


def test_wheel_contents(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    shipped = {path.relative_to(ROOT / "csrc").as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert shipped <= {name.removeprefix("fasttrain/_csrc/") for name in names}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fasttrain").rglob("*.py")}
    assert pages <= names
    assert "fasttrain/_build_info.json" in names
    strays = [name for name in names if not re.match(r"fasttrain/|fasttrain-[\d.]+\w*\.dist-info/", name)]
    assert not strays
    assert not [name for name in names if name.endswith((".cubin", ".ptx", ".o"))]
    assert ("fasttrain/step.fatbin" in names) == bool(json.loads(archive.read("fasttrain/_build_info.json"))["cuda"])


def test_wheel_is_self_contained(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.search(r"_native.*\.so$", name))
        module = archive.extract(name, tmp_path)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", module).stdout)
    assert not [name for name in needed if re.match(r"lib(stdc|gcc|cuda|cudart|torch|c10|nvrtc)", name)], needed


def test_wheel_with_its_dependencies(wheel: Path, python: Path) -> None:
    run(python, "-m", "pip", "install", wheel)
    run(python, "-m", "pip", "check")
    info = step(python)
    assert info["native"]
    assert info["isas"]
    assert Path(info["where"]).is_relative_to(python.parents[1])
    assert run(python, "-m", "fasttrain", "--help").stdout


def test_wheel_compiles_on_demand(wheel: Path, python: Path, tmp_path: Path, no_compiler: dict[str, str]) -> None:
    install(python, wheel)
    number, said = own_rule(python, tmp_path / "cache")
    assert (number is not None, said) == (True, [])
    assert len(list((tmp_path / "cache").glob("cpu-*.so"))) == 1
    number, (said,) = own_rule(python, tmp_path / "cache", env=no_compiler)
    assert number is None
    assert "rule Own is not in the compiled module" in said
    assert "no C++ compiler" in said


def test_without_a_compiler(sdist: Path, python: Path, no_compiler: dict[str, str]) -> None:
    install(python, sdist, env=no_compiler, isolated=True)
    info = step(python, env=no_compiler)
    assert not info["native"]
    assert "no C++ compiler" in info["reason"]


def test_with_a_compiler_that_cannot_compile(sdist: Path, python: Path) -> None:
    install(python, sdist, env={"CXX": "false"})
    info = step(python)
    assert not info["native"]
    assert info["reason"].startswith("false cannot build an empty Python module")


def test_cuda_on_without_a_compiler(sdist: Path, python: Path, no_compiler: dict[str, str]) -> None:
    done = install(python, sdist, env={**no_compiler, "FASTTRAIN_CUDA": "on"}, check=False)
    assert done.returncode != 0
    assert "FASTTRAIN_CUDA=on, but nothing can be compiled: no C++ compiler" in done.stdout + done.stderr


def test_cuda_is_mistyped(sdist: Path, python: Path) -> None:
    done = install(python, sdist, env={"FASTTRAIN_CUDA": "yes"}, check=False)
    assert done.returncode != 0
    assert "'yes', which is none of auto, on, off" in done.stdout + done.stderr


def test_cuda_on_without_nvcc(sdist: Path, python: Path) -> None:
    done = install(python, sdist, env={"FASTTRAIN_CUDA": "on", "CUDACXX": "/nowhere/nvcc"}, check=False)
    assert done.returncode != 0
    assert "FASTTRAIN_CUDA=on, but: /nowhere/nvcc" in done.stdout + done.stderr
    assert "Install a CUDA toolkit" in done.stdout + done.stderr


def test_editable_and_code_that_does_not_compile(tree: Path, python: Path, cxx: str, tmp_path: Path) -> None:
    install(python, "-e", tree, env={"FASTTRAIN_CUDA": "auto", "CUDACXX": "/nowhere/nvcc", "CXX": cxx})
    info = step(python)
    assert info["native"]
    assert info["cuda"] == []
    assert info["cuda_reason"].startswith("/nowhere/nvcc --list-gpu-code failed")
    assert Path(info["where"]) == tree / "fasttrain"
    number, said = own_rule(python, tmp_path / "cache")
    assert (number is not None, said) == (True, [])

    with (tree / "csrc" / "bindings.cpp").open("a") as source:
        source.write("#error this does not compile\n")
    done = install(python, tree, env={"CXX": cxx}, check=False)
    assert done.returncode != 0, "a compiler that rejects our code must fail the build, not install without it"
    assert "this does not compile" in done.stdout + done.stderr
