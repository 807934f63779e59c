"""The loop around a small model: what it tells, when it ends, what it saves, and how it goes back."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.checkpoint import Checkpointer, Keep, NoSpace, space
from fasttrain.checkpoint.find import complete
from fasttrain.data import Loader, Windows
from fasttrain.guards import EarlyStopping, Gap, LossSpikes, NonFinite, TooManyBadSteps
from fasttrain.optim import AdamW
from fasttrain.schedules import Scheduler, linear, rounded, warmup_cosine
from fasttrain.train.batches import split
from fasttrain.train.fit import Loop, fit

STEPS, BATCH = 30, 4
STREAM = np.random.default_rng(0).integers(0, 16, 5000).astype(np.uint8)
POISON = 255  # a byte that makes the loss of its batch what a test wants


class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 16)

    def forward(self, x):
        return self.table(x)


def mean_loss(model, batch):
    tokens = batch["tokens"].long()
    loss = nn.functional.cross_entropy(model(tokens[:, :-1] % 16).flatten(0, 1), tokens[:, 1:].flatten() % 16)
    return loss * batch.get("factor", 1.0)


class Poisoned(Loader):
    """A loader some of whose samples make the loss what they say."""

    def __init__(self, factors, **options):
        super().__init__(Windows(STREAM, length=8), BATCH, seed=0, **options)
        self.factors = factors

    def __next__(self):
        batch = super().__next__()
        factors = [self.factors.get(int(i), 1.0) for i in batch["indices"]]
        return {**batch, "factor": max(factors, key=lambda one: (math.isnan(one), one))}


def made(factors=(), **options):
    """A loop, and the records that it will tell."""
    model, told = Bigram(), []
    optimizer = AdamW(model.parameters(), lr=0.05)
    loop = Loop(model, Poisoned(dict(factors)), optimizer, mean_loss, steps=STEPS, tokens=BATCH * 8,
                schedule=Scheduler(optimizer, lr=warmup_cosine(STEPS, 3)), callbacks=[told.append], **options)
    return loop, told


def of(told, event):
    return [record for record in told if record["event"] == event]


def test_what_is_told():
    loop, told = made(log_every=10, evaluate=lambda step: {"loss": 3.0 - step / 100}, evaluate_every=15, gap=Gap())
    ended = loop.run()
    assert (ended.step, ended.reason, ended.metrics, ended.traffic) == (30, "done", {"loss": 2.7}, None)
    assert [(r["event"], r["step"]) for r in told] == [
        ("train", 10), ("validation", 15), ("train", 20), ("train", 30), ("validation", 30)]
    first, last = of(told, "train")[0], of(told, "train")[-1]
    assert last["loss"] < first["loss"]
    assert last["gap" if "gap" in last else "lr"] == pytest.approx(0.05 * warmup_cosine(STEPS, 3)(29))
    assert of(told, "validation")[0]["gap"] == pytest.approx(2.85 - first["loss"])
    assert first["grad_norm"] > 0
    assert first["skipped"] == 0
    assert set(first["share"]) == {"data", "forward_backward", "optimizer"}


def test_a_run_whose_validation_gets_no_better_ends():
    loop, told = made(evaluate=lambda step: {"loss": abs(step - 10.0)}, evaluate_every=5,
                      early=EarlyStopping(patience=1))
    ended = loop.run()
    assert ended.step == 20
    assert ended.reason == "no better than 0.0 of step 10 for 2 evaluations"
    assert [r["patience_left"] for r in of(told, "validation")] == [1, 1, 0, 0]


def test_a_step_that_is_not_finite_is_skipped_and_told():
    loop, told = made({9: math.nan})
    loop.run()
    (skipped,) = of(told, "skipped")
    assert skipped["step"] == 3
    assert "samples 8 to 11: a gradient is not finite in table.weight" in skipped["text"]
    assert of(told, "train")[-1]["skipped"] == 1
    assert all(math.isfinite(r["loss"]) for r in of(told, "train"))


def test_too_many_of_them_end_the_run_saved_as_it_was_before(tmp_path):
    with Checkpointer(tmp_path, every=4) as checkpoints:
        loop, _ = made(dict.fromkeys(range(20, 60), math.nan), bad_steps=NonFinite(most=3), checkpoints=checkpoints)
        with pytest.raises(TooManyBadSteps, match="3 steps in a row") as error:
            loop.run()
    assert error.value.last_good == 5
    assert [record["batch"] for record in error.value.report] == [[20, 4], [24, 4], [28, 4]]
    assert f"is saved in {tmp_path}" in error.value.__notes__[0]
    newest = complete(tmp_path)[0]
    assert newest.step == 8
    good = Bigram()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.load({"model": good})
    assert torch.isfinite(good.table.weight).all()


def test_an_exception_is_saved_where_it_can_be_gone_on_from(tmp_path):
    """The batch whose step was not made comes again."""
    def failing(model, batch):
        if batch["indices"][0] == 40 and failing.armed:
            raise MemoryError("no room")
        return mean_loss(model, batch)

    def run(folder, armed):
        failing.armed = armed
        model = Bigram()
        optimizer = AdamW(model.parameters(), lr=0.05)
        with Checkpointer(folder) as checkpoints:
            loop = Loop(model, Loader(Windows(STREAM, length=8), BATCH, seed=0), optimizer, failing, steps=20,
                        checkpoints=checkpoints)
            return loop.run(), model.table.weight

    _, unbroken = run(tmp_path / "whole", False)
    with pytest.raises(MemoryError) as error:
        run(tmp_path / "broken", True)
    assert "the state after step 10 is saved" in error.value.__notes__[0]
    ended, weight = run(tmp_path / "broken", False)
    assert ended.step == 20
    assert torch.equal(weight, unbroken)


def test_a_spike_goes_back_and_past_its_batches(tmp_path):
    factors = dict.fromkeys((88, 92), 50.0)  # the batches of steps 23 and 24
    with Checkpointer(tmp_path, every=5, keep=Keep(last=3)) as checkpoints:
        spikes = LossSpikes(window=16, warmup=8, patience=2)
        loop, told = made(factors, spikes=spikes, checkpoints=checkpoints)
        ended = loop.run()
    assert (ended.step, ended.reason, spikes.rollbacks) == (30, "done", 1)
    assert [r["step"] for r in of(told, "spike")] == [23, 24]
    (back,) = of(told, "resume")
    assert (back["step"], back["text"]) == (20, "went back to step 20; samples 88 to 95 are left out")
    assert loop.data.state_dict()["skipped"] == [[88, 8]]
    assert loop.data.index == 30 * BATCH + 8


def test_spikes_that_come_again_end_the_run(tmp_path):
    factors = dict.fromkeys(range(80, 400), 50.0)
    with Checkpointer(tmp_path, every=5) as checkpoints:
        loop, _ = made(factors, spikes=LossSpikes(window=16, warmup=8, patience=1, most=2), checkpoints=checkpoints)
        assert loop.run().reason.endswith("again, after 2 rollbacks")


def test_what_has_changed_since_is_told(tmp_path):
    told = []
    for accumulate, steps in ((1, 10), (2, 30)):
        with Checkpointer(tmp_path) as checkpoints:
            loop, told = made(checkpoints=checkpoints, accumulate=accumulate)
            loop.steps = steps
            loop.run()
    assert [r["text"] for r in of(told, "resume")] == [
        "resumed from step-000000000010; accumulate was 1 and is 2"]


def test_a_full_disk_is_foreseen_after_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "free_bytes", lambda path: 1000)
    with Checkpointer(tmp_path, every=25) as checkpoints:
        loop, _ = made(checkpoints=checkpoints)
        with pytest.raises(NoSpace, match="1,000"):
            loop.run()
    assert loop.step <= 1


def test_the_size_of_batches_follows_a_schedule_through_a_stop(tmp_path):
    sizes = rounded(linear(20, start=4, end=12), 4)
    weights, told = {}, {}
    for folder, stops in (("whole", (STEPS,)), ("stopped", (9, STEPS))):
        for stop in stops:
            with Checkpointer(tmp_path / folder) as checkpoints:
                loop, told[folder] = made(checkpoints=checkpoints, batch_size=sizes)
                loop.steps = stop
                loop.run()
        weights[folder] = loop.stepper.bare.table.weight
    assert loop.data.index == sum(round(sizes(step)) for step in range(STEPS))
    assert {round(sizes(step)) for step in range(STEPS)} == {4, 8, 12}
    assert torch.equal(weights["whole"], weights["stopped"])
    model = Bigram()
    with pytest.raises(ValueError, match="the data cannot change its batches"):
        Loop(model, [], AdamW(model.parameters()), mean_loss, steps=1, batch_size=sizes)


def test_data_that_ends_is_an_error_and_splits_are_even():
    model = Bigram()
    batches = [{"tokens": torch.zeros(4, 9, dtype=torch.uint8)}] * 3
    with pytest.raises(ValueError, match="the data ended after 3 of 5 steps"):
        fit(model, batches, AdamW(model.parameters()), mean_loss, steps=5)
    with pytest.raises(ValueError, match="a batch of 4 cannot be divided into 3"):
        fit(model, batches, AdamW(model.parameters()), mean_loss, steps=5, accumulate=3)
    with pytest.raises(ValueError, match="give checkpoints"):
        made(spikes=LossSpikes(patience=1))
    one, two = split((torch.arange(4), [torch.ones(2), "text"]), 2)
    assert one[0].tolist() == [0, 1]
    assert two[1] == [torch.ones(1), "text"]
