"""A profile of a loop: its files, its table, and phases under their names."""

import json

import pytest
import torch

from fasttrain.train.clock import PhaseClock
from fasttrain.train.profiling import Profile


def test_a_trace_names_phases_and_operations(tmp_path):
    clock, a = PhaseClock(torch.device("cpu")), torch.ones(256, 256)
    with Profile(tmp_path, after=2, steps=3) as profiled:
        for step in range(8):
            with clock("data"):
                torch.zeros(10)
            with clock("forward_backward"):
                a @ a
            assert (profiled.text is not None) == (step > 4)
            profiled.step()
    lines = profiled.text.splitlines()
    assert lines[0].startswith("3 steps")
    assert [line.split()[1] for line in lines[1:3]] == ["data", "forward-backward"]
    assert any(line.split()[0] == "aten::mm" and line.endswith("1 calls") for line in lines)
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("forward_backward") == 3
    assert names.count("aten::mm") == 3
    assert set(clock.take()) == {"data", "forward_backward"}


def test_it_needs_a_step_to_warm_up():
    with pytest.raises(ValueError, match="at least one step to warm up"):
        Profile(None, after=0)
