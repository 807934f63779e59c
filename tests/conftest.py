"""What every test shares: the versions above the run, and the reason under it for each GPU test that could not run.

`make test-gpu` collects this file on a bare machine: it imports nothing but torch, numpy, pytest and fasttrain.
"""

import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiling import compiler as compiler
from compiling import forget as forget
from compiling import module as module
from helpers import usable

import fasttrain

if importlib.util.find_spec("hypothesis"):  # absent on a bare GPU machine
    import hypothesis

    hypothesis.settings.register_profile("fasttrain", deadline=None)  # a shared machine's clock proves nothing
    hypothesis.settings.load_profile("fasttrain")


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that steps CPU tensors by itself; the tests of the others name them."""
    if reason := usable(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small operations: on a machine with other work, torch's threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def pytest_report_header() -> list[str]:
    versions = [f"{name} {version_of(name)}" for name in ("numpy", "triton", "hypothesis")]
    cuda = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if torch.cuda.is_available() else "none"
    info = Path(fasttrain.__file__).with_name("_build_info.json")
    build = json.loads(info.read_text()) if info.is_file() else {"native": False, "reason": f"{info} is missing"}
    compiled = "{isas}, CUDA {cuda} {cuda_reason}".format(**build) if build["native"] else f"none: {build['reason']}"
    return [
        f"fasttrain {fasttrain.__version__}, torch {torch.__version__}, {', '.join(versions)}",
        f"{platform.machine()}, {torch.get_num_threads()} torch threads; GPU: {cuda}; compiled part: {compiled}",
    ]


@pytest.fixture(scope="session", autouse=True)
def cache_of_compiled_rules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rules that tests compile go to a directory of this run, as they would on a new machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTTRAIN_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, torch sees none (make test-gpu)"))
