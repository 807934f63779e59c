"""Why the CUDA backend cannot run, or a launch failed: each reason in words, and the next backend in its place."""

from __future__ import annotations

import pytest
import torch
from fake_driver import CPU, F32, GPU, compile_library, items_of, needs_driver
from fake_driver import fake as fake
from fake_driver import library as library
from helpers import generator

from fasttrain.kernels import cuda, dispatch, native
from fasttrain.optim import SGD

pytestmark = needs_driver


def test_why_not_where_it_runs(fake):
    assert cuda.why_not(GPU) is None
    assert cuda.Place(torch.device("cuda")).ordinal() == 0 or torch.cuda.is_available()
    assert cuda.why_not(CPU) == "it steps tensors in the memory of an NVIDIA GPU, not on cpu"


def test_no_driver(fake, monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so.1")
    assert cuda.why_not(GPU).startswith("there is no CUDA driver: libcuda-that-is-not-there.so.1: cannot open")


def test_not_a_driver(fake, monkeypatch, tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int cuInit(unsigned) { return 0; }\n')
    monkeypatch.setattr(cuda, "LIBRARY", str(compile_library(source, tmp_path / "libother.so")))
    assert "libother.so has no cuDriverGetVersion: it is not a CUDA driver, or too old" in cuda.why_not(GPU)


def test_driver_that_does_not_start(fake):
    fake.lib.fake_fail(b"cuInit", 999)
    assert cuda.why_not(GPU) == "there is no CUDA driver: cuInit: error 999"


def test_no_device_code(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "IMAGE", tmp_path / "absent.fatbin")
    assert cuda.why_not(GPU) == (f"this build has no device code ({native.build_info()['cuda_reason']}), and none can "
                                 "be compiled at run time: CuPy is not here")


def test_old_gpu(fake):
    fake.lib.fake_set(fake.callback, 13000, 7, 5)
    assert cuda.why_not(GPU) == "GPU 0 has compute capability 7.5; these kernels need 8.0 or newer"


@pytest.mark.parametrize("error, text", [(209, "CUDA_ERROR_NO_BINARY_FOR_GPU, no kernel image is available"),
                                         (222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION, the provided PTX was compiled")])
def test_image_that_the_driver_refuses(fake, error, text):
    fake.lib.fake_set(fake.callback, 12040, 9, 0)
    fake.lib.fake_fail(b"cuModuleLoadData", error)
    reason = cuda.why_not(GPU)
    assert f"cuModuleLoadData: {text}" in reason
    assert "The driver is for CUDA 12.4: install a newer driver, or build with an older toolkit" in reason
    with pytest.raises(RuntimeError, match="the CUDA backend cannot step tensors on cpu: GPU 0 cannot load"):
        cuda.step(items_of([SGD.rules[0]], [F32], generator(7), sizes=(3,)))


@pytest.mark.parametrize("what", ["driver", "gpu", "none"])
def test_automatic_choice(fake, monkeypatch, what):
    """A driver or a GPU that is too old leaves the step to Triton, and the reasons say so; a forced backend raises."""
    if what == "driver":
        fake.lib.fake_set(fake.callback, 12040, 9, 0)
        fake.lib.fake_fail(b"cuModuleLoadData", 222)
    elif what == "gpu":
        fake.lib.fake_set(fake.callback, 13000, 7, 5)
    else:
        monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so.1")
    said = {"driver": "install a newer driver", "gpu": "kernels need 8.0 or newer", "none": "no CUDA driver"}[what]
    monkeypatch.setattr(dispatch.load("triton"), "why_not", lambda device: None)
    dispatch._best.cache_clear()
    try:
        assert dispatch.choose(GPU) == "triton"
        assert said in (dispatch.reasons(GPU)["cuda"] or "")
        with pytest.raises(RuntimeError, match=f"backend 'cuda' was asked for and cannot run: .*{said}"):
            dispatch.choose(GPU, "cuda")
    finally:
        dispatch._best.cache_clear()


def test_launch_that_fails(fake):
    """The driver's text arrives, and nothing is counted as done."""
    items = items_of([SGD.rules[0]], [F32], generator(8), sizes=(3,))
    fake.lib.fake_fail(b"cuLaunchKernel", 101)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel\(step_SGD_F32_F32_F32\): CUDA_ERROR_INVALID_DEVICE, text"):
        cuda.step(items)
    assert items[0].counter.item() == 0


def test_unknown_kernel(fake):
    with pytest.raises(RuntimeError, match=r"cuModuleGetFunction\(other\): CUDA_ERROR_NOT_FOUND"):
        cuda.code(0)[0].launch(kernel="other", blocks=1, threads=1, stream=0, table=0, chunks=0, rows=0)
