"""Who may import whom: a file imports from lower floors only, or sideways where no circle forms."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fasttrain"

FLOORS = {
    "cli": 6, "commands": 6, "doctor": 6, "__main__": 6,
    "train": 5, "plan": 5, "schedules": 5, "data": 5, "checkpoint": 5, "guards": 5,
    "parallel": 4,
    "optim": 3, "losses": 3,
    "dist": 2, "kernels": 2,
    "rule": 1, "precision": 1,
}  # fmt: skip
OFTEN_IMPORTED = {"cupyx": "cupy", "mpl_toolkits": "matplotlib"}  # import name -> import name of its distribution


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Yield (line, full module name) for every import in a module: at its top, in a function, or for types only."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if inner in MODULES or inner == "fasttrain._native" else source
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def floor(name: str) -> int | None:
    """The floor of a module of the package; None for what belongs to none: the package itself and the native module."""
    first = name.removeprefix("fasttrain").lstrip(".").split(".")[0]
    return None if first in ("", "_native") else FLOORS[first]


def test_every_module_has_a_floor() -> None:
    homeless = [name for name in MODULES if name != "fasttrain" and name.split(".")[1] not in FLOORS]
    assert not homeless, f"{homeless} stand on no floor: name them in FLOORS and in the design"


def test_no_import_runs_up() -> None:
    runs_up = [
        f"{MODULES[name].relative_to(ROOT)}:{line}: floor {floor(name)} imports {target} of floor {floor(target)}"
        for name in MODULES
        for line, target in imports(name)
        if target.split(".")[0] == "fasttrain" and (floor(name) or 9) < (floor(target) or 0)
    ]
    assert not runs_up, "imports that run up:\n" + "\n".join(runs_up)


def test_no_circle() -> None:
    graph = {
        name: {target for _, target in imports(name) if target in MODULES and target not in (name, "fasttrain")}
        for name in MODULES
        if name != "fasttrain"  # loads its parts lazily
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def declared() -> set[str]:
    """The import names of every dependency and extra in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}  # type: ignore[index]
    names -= {"fasttrain"}  # an extra that includes another
    return {"cupy" if name.startswith("cupy-cuda") else name.replace("-", "_") for name in names}


def test_every_import_is_declared() -> None:
    known = declared() | sys.stdlib_module_names | {"fasttrain"}
    undeclared = [
        f"{MODULES[name].relative_to(ROOT)}:{line}: {target}"
        for name in MODULES
        for line, target in imports(name)
        if OFTEN_IMPORTED.get(target.split(".")[0], target.split(".")[0]) not in known
    ]
    assert not undeclared, "neither a dependency nor an extra in pyproject.toml:\n" + "\n".join(undeclared)


@pytest.mark.parametrize("module", ["fasttrain", "fasttrain.optim", "fasttrain.kernels", "fasttrain.losses"])
def test_imports_only_torch_and_numpy(module: str) -> None:
    code = f"import sys, numpy, torch; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    extra = {name for name in loaded if name.split(".")[0] in declared() - {"torch", "numpy"}}
    assert not extra, f"import {module} loads {sorted(extra)}: import them where they are used"
    assert "fasttrain._native" not in loaded, f"import {module} loads the native module: load it at first use"
