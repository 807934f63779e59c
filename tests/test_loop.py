"""The training loop, on a pool of ranks: it learns, repeats itself to the bit, and does not depend on the ranks."""

import dataclasses
import math

import numpy as np
import pytest
import ranks
import torch

from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire
from fasttrain.optim.local import is_dtensor
from fasttrain.schedules import warmup_cosine
from fasttrain.train import recipe
from fasttrain.train.config import TrainConfig
from fasttrain.train.division import divide
from fasttrain.train.loop import train
from fasttrain.train.text import Text
from fasttrain.train.validation import held_out_nats, validation

TINY = TrainConfig(optimizer="torch.AdamW", steps=12, batch=4, sequence=32, layers=1, width=32, heads=2, warmup=3,
                   log_every=4, validate_every=6)


def make_text():
    words = np.random.default_rng(0).choice([b"alpha ", b"beta ", b"gamma\n", b"delta, "], size=4000)
    stream = np.frombuffer(b"".join(words), dtype=np.uint8)
    return Text(stream[:-500], stream[-500:], 1, 1, "")


def run(wire, config, text=None, ngrams=2, rows=64):
    torch.manual_seed(config.seed)
    text = text or make_text()
    config = dataclasses.replace(config, ngrams=ngrams, rows=rows, processes=wire.size)
    divided = divide(config, Mesh(**config.axes), text.vocabulary)
    records = []
    optimizer = recipe.build(config, divided.called)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    train(config, divided, optimizer, text, records.append)
    peak = recipe.settings(config)["lr"]
    expected = [peak * warmup_cosine(config.steps, config.rise)(step) for step in range(config.steps)]
    assert rates == [[lr, lr] for lr in expected], "both groups follow the schedule"
    return records, [p.detach().full_tensor() if is_dtensor(p) else p.detach() for p in divided.called.parameters()]


def losses(records):
    return [r["loss"] for r in records if r["event"] == "train"]


@pytest.fixture(scope="module")
def two():
    return ranks.run(run, 2, TINY)


def test_it_learns(two):
    records, _ = two[0]
    assert losses(records)[-1] < losses(records)[0] - 0.5
    bits = [r["bits_per_byte"] for r in records if r["event"] == "validation"]
    assert bits[0] == pytest.approx(8, abs=1e-4)
    assert bits[-1] < 7


def test_records_are_complete_and_the_same_on_every_rank(two):
    (records, weights), (others, other_weights) = two
    assert [(r["event"], r["step"]) for r in records] == [
        ("validation", 0), ("train", 4), ("validation", 6), ("train", 8), ("train", 12), ("validation", 12),
        ("wire", 12)]
    assert [r["step"] for r in others] == [r["step"] for r in records]
    assert losses(others) == losses(records)
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    for r in records:
        if r["event"] == "train":
            assert list(r["share"]) == ["data", "forward_backward", "communication", "optimizer"]
            assert sum(r["share"].values()) == pytest.approx(1)
            assert all(share > 0 for share in r["share"].values())
            assert r["tokens_per_s"] > 0
            assert 0 < r["lr"] <= recipe.RECIPES["AdamW"]["lr"]
        if r["event"] == "wire":  # what was counted is the formula, and the control that ends each step
            assert 0 < r["bytes"] - r["formula"] < 200
            assert 0 < r["exposed_s"] < records[-3]["seconds"] / 12
    assert records[-2]["bytes"] == 500


@pytest.mark.parametrize("options", [{"wire": "ordered"}, {"wire": "bf16"}, {"wire": "int8"}, {"accumulate": 2},
                                     {"zero": 1, "optimizer": "AdamW"}, {"zero": 2, "optimizer": "Muon"}])
def test_wires_and_accumulation_learn_the_same(two, options):
    records = ranks.run(run, 2, dataclasses.replace(TINY, **options))[0][0]
    if options.get("optimizer") == "Muon":
        whole_steps = ranks.run(run, 2, dataclasses.replace(TINY, optimizer="Muon"))[0][0]
        assert losses(records) == pytest.approx(losses(whole_steps), rel=1e-5)
    else:
        assert losses(records) == pytest.approx(losses(two[0][0]), rel=1e-2 if "wire" in options else 1e-5)
    sent, whole = (next(r for r in rows if r["event"] == "wire") for rows in (records, two[0][0]))
    share = {"bf16": 0.5, "int8": (1.015625 + 2) / 8}.get(options.get("wire"), 1.0)
    assert sent["formula"] == share * whole["formula"]
    assert 0 < sent["bytes"] - sent["formula"] < 200


@pytest.mark.parametrize("options", [
    {"optimizer": "AdamW", "accumulate": 2}, {"optimizer": "Muon", "clip": 0.5}, {"clip": 0.5}, {"clip": 0.0},
    {"precision": "bf16", "optimizer": "LAMB"}, {"optimizer": "AdamW", "wire": "bf16", "accumulate": 2},
    {"optimizer": "torch.SGD", "precision": "bf16", "accumulate": 2}], ids=str)
def test_a_sharded_model_learns_the_same(options):
    """Optimizers of this package come out in the same weights, bit for bit, if gradients travel in as many bits."""
    config = dataclasses.replace(TINY, steps=6, **options)
    (whole, weights), (records, others) = (ranks.run(run, 2, dataclasses.replace(config, zero=zero))[0]
                                           for zero in (0, 3))
    assert losses(records) == pytest.approx(losses(whole), rel=1e-3 if "wire" in options else 1e-5)
    assert records[-2]["bits_per_byte"] == pytest.approx(whole[-2]["bits_per_byte"], rel=1e-3)
    if "wire" not in options and not config.optimizer.startswith("torch."):
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    sent = records[-1]
    gradient = 2 if config.wire == "bf16" else 4
    assert sent["formula"] == (2 * 4 * config.accumulate + gradient) * sum(p.numel() for p in weights) / 2
    assert 0 < sent["bytes"] - sent["formula"] < 200, "loss and wish to stop of each step"
    assert 0 < sent["exposed_s"] < records[-3]["seconds"] / 6


@pytest.mark.parametrize("size", [1, 3])
def test_a_sharded_model_on_other_numbers_of_ranks(size):
    """With three, some have no windows left to validate on while others have; no dimension is a multiple of three."""
    config = dataclasses.replace(TINY, optimizer="AdamW", batch=6, steps=4, zero=3)
    (whole, _), (records, _) = (ranks.run(run, size, dataclasses.replace(config, zero=zero))[0] for zero in (0, 3))
    assert losses(records) == pytest.approx(losses(whole), rel=1e-5)
    assert records[-2]["bits_per_byte"] == pytest.approx(whole[-2]["bits_per_byte"], rel=1e-5)
    sent = records[-1]
    assert sent["formula"] <= sent["bytes"] <= 1.05 * sent["formula"]  # padding travels, too
    assert (sent["formula"] > 0) == (size > 1)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_one_rank_sends_nothing(zero):
    records, _ = ranks.run(run, 1, dataclasses.replace(TINY, optimizer="AdamW", steps=2, warmup=1, zero=zero))[0]
    assert {name: records[-1][name] for name in ("event", "bytes", "formula")} == {
        "event": "wire", "bytes": 0, "formula": 0}
    assert records[-1]["exposed_s"] >= 0


def test_same_seed_same_bits(two):
    again = ranks.run(run, 2, TINY)
    assert losses(again[0][0]) == losses(two[0][0])
    assert all(torch.equal(a, b) for a, b in zip(again[0][1], two[0][1], strict=True))
    other = ranks.run(run, 2, dataclasses.replace(TINY, seed=1))
    assert losses(other[0][0]) != losses(two[0][0])


def test_the_number_of_ranks_changes_only_rounding(two):
    alone = ranks.run(run, 1, TINY)[0]
    assert losses(alone[0]) == pytest.approx(losses(two[0][0]), rel=1e-5)
    assert alone[0][-2]["bits_per_byte"] == pytest.approx(two[0][0][-2]["bits_per_byte"], rel=1e-5)


def test_ours_and_stock_agree(two):
    ours = ranks.run(run, 2, dataclasses.replace(TINY, optimizer="AdamW"))[0][0]
    assert losses(ours) == pytest.approx(losses(two[0][0]), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("zero", [0, 3])
def test_on_a_gpu_it_learns_the_same(two, zero):
    wire = Wire(torch.device("cuda", 0), store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        records, _ = run(wire, dataclasses.replace(TINY, zero=zero))
    finally:
        wire.close()
    assert losses(records) == pytest.approx(losses(two[0][0]), rel=1e-3)
    assert all(share > 0 for r in records if r["event"] == "train" for share in r["share"].values())
    assert (records[-2]["bytes"], records[-2]["exposed_s"]) == (0, None)


def explode(wire):
    with pytest.raises(FloatingPointError, match=r"10 steps in a row had a loss .*, after step 2: the last is step 12"):
        run(wire, dataclasses.replace(TINY, optimizer="torch.SGD", lr=1e30, clip=0.0))
    return True


def test_a_loss_that_is_not_finite_ends_every_rank_in_the_same_step():
    assert ranks.run(explode, 2) == [True, True]


class Bigram(torch.nn.Module):
    """Logits that depend on the last byte alone: what a window hides does not matter."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 256)

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.table(x)


def bigram_bits(wire):
    torch.manual_seed(0)
    model, stream = Bigram(), make_text().held_out
    nats, count = held_out_nats(model, stream, TINY, wire, most=None)
    assert len(set(map(int, wire.all_gather(torch.tensor([model.calls]))))) == 1, "a sharded model would hang"
    text = torch.from_numpy(stream.copy()).long()
    log_p = model(text[:-1]).log_softmax(-1)
    expected = -log_p.gather(1, text[1:, None]).double().sum().item() + math.log(256)
    quick = validation(model, stream, TINY, wire, most=3)
    return nats, count, expected, quick


@pytest.mark.parametrize("size", [1, 2, 3])
def test_validation_counts_every_byte_once(size):
    for nats, count, expected, quick in ranks.run(bigram_bits, size):
        assert count == 500
        assert nats == pytest.approx(expected, rel=1e-6)
        assert quick["bytes"] < 100
        assert quick["bits_per_byte"] == pytest.approx(expected / 500 / math.log(2), rel=0.2)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"precision": "bf16-pure"},
                                     {"precision": "fp16-pure", "zero": 2}, {"precision": "bf16-pure", "zero": 3},
                                     {"ema": 0.5}, {"recompute": "full", "compile": False}], ids=str)
def test_precisions_averages_and_recomputing_learn_the_same(two, options):
    (records, _), (others, _) = ranks.run(run, 2, dataclasses.replace(TINY, optimizer="AdamW", **options))
    assert losses(records) == losses(others)
    assert losses(records) == pytest.approx(losses(two[0][0]), rel=3e-2 if "precision" in options else 1e-6)
    bits, plain = ([r["bits_per_byte"] for r in rows if r["event"] == "validation"][-1]
                   for rows in (records, two[0][0]))
    assert bits == pytest.approx(plain, rel=0.1 if "ema" in options else 3e-2)
    if "recompute" not in options:
        assert bits != plain
