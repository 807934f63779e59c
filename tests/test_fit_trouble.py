"""The loop around what goes wrong: callbacks, evaluations and saves that fail, ends that last, states of all kinds."""

import math
import time

import pytest
import torch
from test_fit import STEPS, Poisoned, made, mean_loss, of
from torch import nn
from torch.optim import lr_scheduler

from fasttrain import optim
from fasttrain.checkpoint import Checkpointer, Keep
from fasttrain.checkpoint.find import complete
from fasttrain.guards import EarlyStopping, LossSpikes
from fasttrain.schedules import Plateau, Scheduler, warmup
from fasttrain.train.fit import fit


class Net(nn.Module):
    """With all that a forward pass changes: a random generator, and buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.head = nn.Embedding(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.head.weight = self.table.weight
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)

    def forward(self, x):
        y = self.norm(self.table(x).transpose(1, 2)).transpose(1, 2) * self.frozen
        return self.head(nn.functional.dropout(y, 0.2, self.training))


class AfterSteps:
    def __init__(self, steps):
        self.left = steps

    @property
    def asked(self):
        self.left -= 1
        return self.left <= 0


def trained(folder, kind, schedule=None, fails_at=None, **options):
    """The state of a model after the steps that are made of nine."""
    torch.manual_seed(1)
    model = Net()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind([{"params": [p for p in params if p.ndim > 1]},
                      {"params": [p for p in params if p.ndim == 1], "lr": 0.01}], lr=0.02)

    def loss(model, batch):
        value = mean_loss(model, batch)
        if fails_at in batch["indices"].tolist():
            raise MemoryError("no room")
        return value

    def evaluate(step):
        if hasattr(optimizer, "eval"):
            optimizer.eval()
            optimizer.train()
        return {"loss": 1.0}

    with Checkpointer(folder) as checkpoints, Poisoned({}) as data:
        fit(model, data, optimizer, loss, steps=9, evaluate=evaluate, evaluate_every=2, checkpoints=checkpoints,
            schedule=schedule(optimizer) if schedule else None, **options)
    return {**model.state_dict(), "lr": torch.tensor([float(group["lr"]) for group in optimizer.param_groups])}


def same(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])] == []


KINDS = [(optim.ScheduleFreeAdamW, None), (optim.AdamW, lambda o: Scheduler(o, lr=warmup(2), plateau=Plateau(
    factor=0.5, patience=0))), (optim.AdamW, lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0)),
    (torch.optim.AdamW, lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.05], total_steps=10)),
    (optim.AdamW, lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]))]


@pytest.mark.parametrize("kind", KINDS, ids=["free", "plateau", "torchs plateau", "one cycle", "sequence"])
def test_schedules_and_optimizers_with_states_of_their_own_go_on_in_the_same_bits(tmp_path, kind):
    whole = trained(tmp_path / "whole", *kind)
    for steps in (3, 1):
        trained(tmp_path / "parts", *kind, stopping=AfterSteps(steps))
    assert same(trained(tmp_path / "parts", *kind), whole)


def test_an_exception_in_a_step_leaves_what_was_before_its_batch(tmp_path):
    """Dropout has drawn, and BatchNorm has seen the batch."""
    whole = trained(tmp_path / "whole", optim.AdamW, accumulate=2)
    with pytest.raises(MemoryError) as error:
        trained(tmp_path / "broken", optim.AdamW, fails_at=19, accumulate=2)
    assert "after step 4 is saved" in error.value.__notes__[0]
    assert same(trained(tmp_path / "broken", optim.AdamW, accumulate=2), whole)


def test_an_evaluation_that_failed_is_made_when_the_run_goes_on(tmp_path):
    def run(fails_at):
        def evaluate(step):
            if step == fails_at:
                raise OSError("no such file")
            return {"loss": torch.tensor(2.0)}

        with Checkpointer(tmp_path) as checkpoints:
            loop, told = made(evaluate=evaluate, evaluate_every=15, checkpoints=checkpoints)
            return loop.run(), told

    with pytest.raises(OSError, match="no such file"):
        run(STEPS)
    ended, told = run(None)
    assert (ended.step, ended.metrics) == (STEPS, {"loss": 2.0})
    assert [(r["event"], r["step"]) for r in told] == [("resume", STEPS), ("validation", STEPS)]
    assert [r["event"] for r in run(None)[1]] == ["resume", "validation"], "what was saved still owes it"


def test_a_run_that_a_guard_has_ended_stays_ended(tmp_path):
    def run(patience):
        with Checkpointer(tmp_path) as checkpoints:
            return made(evaluate=lambda step: {"loss": 1.0}, evaluate_every=5, early=EarlyStopping(patience),
                        checkpoints=checkpoints)[0].run()

    ended = run(1)
    assert run(1) == ended
    assert ended.reason == "no better than 1.0 of step 5 for 2 evaluations"
    assert run(3)[:2] == (25, "no better than 1.0 of step 5 for 4 evaluations")


@pytest.mark.parametrize(("given", "error", "said"), [
    (None, TypeError, "evaluate returned None: it must return a dict of numbers"),
    ({"loss": "2.5"}, TypeError, "loss='2.5', which is no number"),
    ({"loss": torch.ones(2)}, TypeError, "which is no number"),
    ({"accuracy": 0.5}, KeyError, "evaluate returned accuracy, and no 'loss', which a guard"),
])
def test_what_evaluate_must_return(tmp_path, given, error, said):
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(error, match=said):
        made(evaluate=lambda step: given, evaluate_every=5, early=EarlyStopping(1), checkpoints=checkpoints)[0].run()
    assert complete(tmp_path)[0].step == 5


def test_arguments_that_would_do_nothing():
    for options in ({"early": EarlyStopping(1)}, {"evaluate": dict}, {"evaluate_every": 5}, {"log_every": 0},
                    {"accumulate": 0}, {"accumulate": 1.5}):
        with pytest.raises(ValueError, match=r"give evaluate|give both|must be a whole number"):
            made(**options)


def test_a_save_that_fails_does_not_hide_the_error_before_it(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    def callback(record):
        monkeypatch.setattr(Checkpointer, "save", full)
        raise KeyError("a callback's own")

    with Checkpointer(tmp_path) as checkpoints:
        loop, _ = made(checkpoints=checkpoints)
        loop.callbacks = [callback]
        with pytest.raises(KeyError, match="a callback's own") as error:
            loop.run()
    assert "could not be saved: OSError: [Errno 28]" in error.value.__notes__[0]


def test_the_last_state_is_saved_whatever_the_writer_does(tmp_path, monkeypatch):
    write = Checkpointer._write
    monkeypatch.setattr(Checkpointer, "_write", lambda *arguments: (time.sleep(0.02), write(*arguments))[1])
    with Checkpointer(tmp_path, every=1, keep=Keep(last=None), when_busy="skip") as checkpoints:
        loop, _ = made(checkpoints=checkpoints)
        loop.run()
    assert checkpoints.skipped > 0
    assert sorted(one.step for one in complete(tmp_path)) == loop.keeper.saved
    assert loop.keeper.saved[-1] == STEPS


def test_a_spike_finds_a_checkpoint_that_is_still_there(tmp_path):
    """One is due in the midst of the spike, and would be the only one that is kept."""
    spiked = dict.fromkeys((88, 92), 50.0)  # steps 23 and 24
    for patience, every in ((2, 4), (2, 100)):
        with Checkpointer(tmp_path / str(every), every=every, keep=1) as checkpoints:
            loop, told = made(spiked, spikes=LossSpikes(window=16, warmup=8, patience=patience),
                              checkpoints=checkpoints)
            assert loop.run().reason == "done"
        assert [r["step"] for r in of(told, "resume")] == [20 if every == 4 else 0]
    with Checkpointer(tmp_path / "gone", every=23, keep=1) as checkpoints:
        loop, _ = made(spiked, spikes=LossSpikes(window=16, warmup=8, patience=2), checkpoints=checkpoints)
        with pytest.raises(RuntimeError, match="went up at step 23, and there is no checkpoint from before it"):
            loop.run()


def test_gradients_that_somebody_left_are_no_part_of_a_step():
    norms = []
    for left in (0.0, 100.0):
        loop, told = made(log_every=1)
        loop.steps = 1
        weight = loop.stepper.model.table.weight
        weight.grad = torch.full_like(weight, left)
        loop.run()
        norms.append(told[0]["grad_norm"])
    assert norms[0] == norms[1]


@pytest.mark.parametrize("kind", [optim.AdamW, torch.optim.AdamW])
def test_a_loss_that_is_not_finite_is_told_as_such(kind):
    """Its gradients are finite."""
    loop, told = made(log_every=1)
    model = loop.stepper.model
    before = model.table.weight.clone()
    fit(model, Poisoned({}), kind(model.parameters(), lr=torch.tensor(0.1)),
        lambda model, batch: mean_loss(model, batch) + math.nan, steps=1, log_every=1, callbacks=[told.append])
    assert torch.equal(model.table.weight, before)
    assert of(told, "skipped")[0]["text"].endswith("samples 0 to 3: the loss is not finite")
    assert type(of(told, "train")[0]["lr"]) is float
