"""How `make gpu` times, on what shapes, and on a GPU that is pretended."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.gpu import bench, end_to_end, machine, peers, shapes
from benchmarks.gpu.bench import OURS, Bench, Rival

CPU = torch.device("cpu")


def test_rivals_take_turns_on_their_copies():
    calls: list[str] = []
    rivals = {name: Rival(name, [lambda name=name, copy=copy: calls.append(f"{name}{copy}") for copy in range(2)])
              for name in "ab"}
    seconds = Bench(CPU, dry=True).interleave(rivals)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert calls == ["a0", "a1", "a0", "b0", "b1", "b0", "a1", "b1", "b0", "a0"]


class Event:
    """Stands for a CUDA event."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.log.append("event")

    def synchronize(self) -> None:
        self.log.append("wait for the event")

    def elapsed_time(self, end: Event) -> float:
        return 2.5


@pytest.fixture
def pretended(monkeypatch) -> Bench:
    """A bench on a GPU that is not there: what it asks of torch is noted, and answered."""
    Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: Event.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Event.log.append(f"busy for {cycles}"))
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 << 30, L2_cache_size=60 << 20,
                                 multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return Bench(torch.device("cuda", 0), ceiling=4e12)


def test_a_gpu_is_busy_until_the_host_has_started_the_kernels(pretended):
    assert pretended.seconds(lambda: Event.log.append("call"), 1e-3) == 2.5e-3
    assert Event.log == ["wait", "busy for 2500000", "event", "call", "event", "wait for the event"]
    Event.log.clear()
    pretended.seconds(lambda: Event.log.append("call"), 0.0)
    assert Event.log == ["wait", "event", "call", "event", "wait for the event"]


def test_no_cache_holds_the_copies(pretended):
    assert pretended.copies(8 * 25_557_032) == 3  # ResNet-50: 3 x 204 MB, and the cache 8 x 63 MB
    assert pretended.copies(8_000_000_000) == 1


def test_rows_against_the_ceiling_of_a_gpu(pretended):
    rivals = {name: Rival(name, [lambda: None]) for name in (OURS, "peer")}
    row = pretended.row("w", rivals, section="adamw", elements=10**9, each=8, absent={}, note="")
    assert row["value"] == {OURS: 2.5, "peer": 2.5}
    assert row["of_copy"] == pytest.approx(8e9 / 2.5e-3 / 4e12)
    assert (row["spread"], row["rounds"]) == (0.0, 30)
    assert not {"absent", "note"} & set(row)


def test_the_batch_that_fills_a_gpu(pretended, monkeypatch):
    size, most = end_to_end.SIZE, 0.9 * (140 << 30)
    monkeypatch.setattr(end_to_end, "peak", lambda bench, how, size, batch: int(2e9 + 5e9 * batch))
    batch = end_to_end.filling(pretended, size)
    assert batch % 8 == 0
    assert 2e9 + 5e9 * batch <= most < 2e9 + 5e9 * (batch + 8)
    monkeypatch.setattr(end_to_end, "peak", lambda bench, how, size, batch: int(2e9 + 1e8 * batch))
    assert end_to_end.filling(pretended, size) == 40


def test_a_gpu_is_described(pretended, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    found = machine.gpu()
    assert (found["gpu"], found["capability"], found["driver"]) == ("NVIDIA H200", "9.0", "580.1")


def test_rewritten_gradients_are_filled_again():
    made = Bench(CPU, dry=True)
    (p,) = made.parameters([(4,)], torch.float32)
    before = p.grad.clone()
    fill = bench.refill([[p.grad]])
    p.grad.zero_()
    fill(0)
    assert torch.equal(p.grad, before)
    assert bool((before != 0).all())


def test_failing_peers_are_reported_and_our_own_failures_raised():
    def broken(params: Any) -> Any:
        raise ValueError("first line\nsecond")

    made = Bench(CPU, dry=True)
    models = [made.parameters([(4,)], torch.float32)]
    assert made.rivals({"apex": broken}, models) == ({}, {"apex": "ValueError: first line"})
    with pytest.raises(ValueError, match="first line"):
        made.rivals({OURS: broken}, models)
    assert peers.found({"x": peers.Peer("no_such_module", "Adam")})[1] == {
        "x": "ModuleNotFoundError: No module named 'no_such_module'"}


def test_shapes_are_those_of_the_models():
    assert (len(shapes.gpt2()), shapes.count(shapes.gpt2())) == (148, 124_439_808)
    assert (len(shapes.llama3_8b()), shapes.count(shapes.llama3_8b())) == (291, 8_030_261_248)
    assert (len(shapes.resnet50()), shapes.count(shapes.resnet50())) == (161, 25_557_032)
    assert len(shapes.gpt2_matrices()) == 48
    assert 0.9e9 < shapes.count(shapes.llama_1b()) < 1.1e9
    assert sum(shape == (512, 1024) for shape in shapes.experts(1)) == 2 * 64
    assert shapes.scaled([(10,), (20,), (30,)], 35) == [(10,), (20,)]
    model = end_to_end.GPT2(**{**end_to_end.SIZE, "vocabulary": 50257, "layers": 1, "positions": 1024})
    block = sum(math.prod(shape) for shape in shapes.gpt2()[2:14])
    assert sum(p.numel() for p in model.parameters()) == shapes.count(shapes.gpt2()) - 11 * block


def test_what_does_not_fit_is_scaled_and_said(monkeypatch):
    made = Bench(CPU)
    monkeypatch.setattr(Bench, "free", lambda self: 1000)
    kept, note = made.fitting(shapes.equal(10, 100), 4)
    assert kept == [(25,)] * 10
    assert "the memory holds no more" in note
    assert made.fitting(shapes.equal(10, 25), 4) == ([(25,)] * 10, "")
