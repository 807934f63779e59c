"""Steps that a device drives, by the kernels of GPUs: in Triton's interpreter, and CUDA's device code on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import needs_native
from test_cuda_driver import fake as fake
from test_cuda_driver import library as library
from test_driven import STEPS, STORAGES, Training, assert_same
from test_graph import Tape
from test_graph import Training as Fixed

from fasttrain.kernels import cuda
from fasttrain.optim import ASGD, SGD, AdamW, Lion, NAdam, Optimizer, ScheduleFreeAdamW, drive
from fasttrain.optim.graph import StepGraph

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__contains__")
KEPT = dict(dtype=torch.bfloat16)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        request.getfixturevalue("fake")
        monkeypatch.setattr(cuda, "why_not", lambda device: None)
    else:
        pytest.importorskip("triton", reason="triton is not installed")
    return request.param


def on(backend: str, kind: type[Optimizer], *marks: Any, **options: Any) -> Any:
    marks = (needs_native,) if backend == "cuda" else marks
    return pytest.param(backend, kind, options, marks=marks, id=f"{backend} {kind.__name__} {' '.join(options)}")


CASES = [
    on("cuda", AdamW, weight_decay=0.1), on("cuda", SGD, lr=0.1, momentum=0.9, dampening=0.5), on("cuda", Lion),
    on("cuda", AdamW, **KEPT, **STORAGES["split, int8"]), on("cuda", Lion, **KEPT, **STORAGES["8-bit remainder, fp8"]),
    on("cuda", AdamW, **KEPT, storage="6-byte", min_size=1),
    on("triton", AdamW, **KEPT, **STORAGES["stochastic, int4"]), on("triton", NAdam),
    on("triton", ASGD, pytest.mark.slow, t0=2), on("triton", ScheduleFreeAdamW, pytest.mark.slow)]
CASES += [on("triton", kind, pytest.mark.slow, **KEPT, **options) for kind in (AdamW, Lion)
          for options in STORAGES.values()]


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")  # as GPUs, silently
@pytest.mark.parametrize("backend, kind, options", CASES, indirect=["backend"])
def test_bits_are_those_of_steps_on_the_host(backend: str, kind: type[Optimizer], options: dict[str, Any]):
    steps = range(STEPS if backend == "cuda" else 4)
    got = Training(kind, True, backend=backend, **options).run(steps)
    assert got.optimizer.last_step.driven
    assert_same(got, Training(kind, False, **options).run(steps), backend)


def refused(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("the host read a tensor")


@needs_native
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("options", [{}, dict(**KEPT, storage="6-byte", min_size=1, clip_each=0.5)],
                         ids=["plain", "6-byte"])
def test_no_step_reads_a_tensor_on_the_host(backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Unscale, check, norm, clip, step, schedule, dynamic loss scale; after the first step."""
    training = Training(AdamW, True, backend=backend, **options).run(range(3))
    before = [p.detach().clone() for p in training.params]
    training.give(3)
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refused)
        training.optimizer.param_groups[0]["lr"] = 0.5
        training.scaler.step(training.optimizer, max_norm=0.5)
        with pytest.raises(AssertionError, match="the host read a tensor"):
            training.scaler.get_scale()
    assert not any(torch.equal(p, old) for p, old in zip(training.params, before, strict=True))
    assert training.optimizer.last_step.host_syncs == 0
    assert training.optimizer.last_step.driven


@needs_native
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("kind, options", [
    (AdamW, {}), (SGD, dict(lr=0.1, momentum=0.9, dampening=0.5)),
    (AdamW, dict(**KEPT, storage="6-byte", min_size=1)), (Lion, dict(**KEPT, **STORAGES["8-bit remainder, fp8"]))],
    ids=["AdamW", "SGD", "AdamW 6-byte", "Lion 7-byte"])
def test_replays_are_launches_and_nothing_else(backend: str, kind: type[Optimizer], options: dict[str, Any],
                                               monkeypatch: pytest.MonkeyPatch):
    """What a graph holds is called again while the host cannot read; the bits are those of steps without a graph."""
    monkeypatch.setattr(StepGraph, "recorder", Tape)
    got, wanted = Fixed(kind, True, backend=backend, **options), Fixed(kind, False, **options)
    for step in range(3):
        got.step(step)
    replay = Tape.replay

    def unread(tape: Tape) -> None:
        with monkeypatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, refused)
            replay(tape)

    monkeypatch.setattr(Tape, "replay", unread)
    for step in range(3, 8):
        got.step(step)
    wanted.run(8)
    assert got.made.captured
    assert not drive.capturing()
    for a, b in zip(got.ends()[0], wanted.ends()[0], strict=True):
        assert torch.equal(a, b)
