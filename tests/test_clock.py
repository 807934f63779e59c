"""The phase clock."""

import time

import pytest
import torch

from fasttrain.train.clock import PhaseClock


def test_phases_add_up_and_start_anew():
    clock = PhaseClock(torch.device("cpu"))
    for phase, seconds in (("a", 0.02), ("b", 0.01), ("a", 0.02)):
        with clock(phase):
            time.sleep(seconds)
    taken = clock.take()
    assert list(taken) == ["a", "b"]
    assert 0.04 <= taken["a"] < 0.2
    assert 0.01 <= taken["b"] < 0.1
    assert clock.take() == {}


@pytest.mark.gpu
def test_on_a_gpu_it_times_the_work_and_not_the_call():
    device = torch.device("cuda")
    clock = PhaseClock(device)
    x = torch.randn(8192, 8192, device=device)
    x @ x
    torch.cuda.synchronize()
    begun = time.perf_counter()
    with clock("matmul"):
        for _ in range(20):
            x = (x @ x).tanh()
    returned = time.perf_counter() - begun
    assert clock.take()["matmul"] > 2 * returned
