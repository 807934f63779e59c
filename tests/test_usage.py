"""What is used of the machine, against what can be counted by hand."""

import ctypes
import dataclasses

import pytest
import torch
from torch import nn

from fasttrain.train.config import TrainConfig
from fasttrain.train.making import flops_of_step
from fasttrain.train.model import GPT
from fasttrain.train.usage import Memory, Tidy, count_flops, peak_flops, weights_table


def test_operations_of_a_gpt_are_those_of_its_formula():
    layers, width, T, B = 2, 32, 16, 3
    model = GPT(layers=layers, width=width, heads=2, positions=T)
    logits, flops = count_flops(lambda: model(torch.zeros(B, T, dtype=torch.long)))
    assert logits.shape == (B, T, 256)
    products = layers * 12 * width * width + width * 256   # weights of qkv, out, up, down; of the head
    attention = layers * 2 * T * width                     # scores and values of one position over all others
    assert flops == 2 * B * T * (products + attention)


@pytest.mark.parametrize("name, dtype, expected", [
    ("NVIDIA H200", torch.bfloat16, 989e12), ("NVIDIA H100 PCIe", torch.float16, 756e12),
    ("NVIDIA L40S", torch.bfloat16, 362e12), ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
    ("NVIDIA H200", torch.float32, None), ("Some GPU", torch.bfloat16, None)])
def test_peaks_by_name(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), dtype) == expected


def test_memory_grows_with_what_is_allocated():
    memory = Memory(torch.device("cpu"))
    before = memory.now()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    after = memory.now()
    assert after["memory_gb"] - before["memory_gb"] > 0.05
    assert after["peak_gb"] >= after["memory_gb"] - 0.01
    del block


def test_weights():
    model = nn.Linear(10, 5, dtype=torch.bfloat16)
    model.bias.requires_grad_(False)
    assert weights_table(model) == {"parameters": 110, "gradients": 100, "buffers": 0}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_memory_that_is_kept_free_is_given_back():
    """Blocks of 64 KiB come from the heap, and a block at its end keeps it from shrinking by itself."""
    memory, tidy = Memory(torch.device("cpu")), Tidy()
    tidy._before = round(memory.now()["memory_gb"] * 2**30)
    blocks = [torch.ones(64 << 10, dtype=torch.uint8) for _ in range(16384)]
    last = blocks[-1]
    del blocks
    grown = memory.now()["memory_gb"]
    assert tidy.look()
    assert memory.now()["memory_gb"] < grown - 0.5
    assert not tidy.look()
    assert last.all()


@pytest.mark.parametrize("precision", ["bf16", "bf16-pure", "fp16-pure"])
def test_operations_do_not_depend_on_the_precision(precision):
    config = TrainConfig(layers=1, width=32, heads=2, ngrams=1, batch=2, processes=2, sequence=16)
    assert flops_of_step(dataclasses.replace(config, precision=precision)) == flops_of_step(config)
