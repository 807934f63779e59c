"""`Scheduler`: schedules on an optimizer, built and loaded in any order, under scalers, ZeRO and captured steps."""

import copy
import itertools
import json
import warnings
from typing import Any

import pytest
import ranks
import torch
from test_graph import Tape

from fasttrain import LossScaler, StepGraph
from fasttrain import optim as ours
from fasttrain import schedules as s

STEPS = 12
LR = s.warmup_cosine(STEPS, warmup=3, floor=0.1)
KINDS = {"torch.SGD": torch.optim.SGD, "torch.AdamW": torch.optim.AdamW, "SGD": ours.SGD, "AdamW": ours.AdamW}


class Run:
    """Two groups of different rates and decay."""

    def __init__(self, kind: str = "AdamW", scheduled: bool = True, **options: Any):
        torch.manual_seed(1)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = KINDS[kind]([{"params": [self.model.weight], "lr": 0.1, "weight_decay": 0.2},
                                      {"params": [self.model.bias], "lr": 0.02, "weight_decay": 0.0}],
                                     **({"momentum": 0.9} if "SGD" in kind else {}))
        self.options = {"lr": LR, "momentum": s.linear(STEPS, 0.95, 0.85), "weight_decay": s.step_decay(4, 0.5),
                        **options}
        if scheduled:
            self.schedule()

    def schedule(self) -> None:
        self.scheduler = s.Scheduler(self.optimizer, **self.options)

    def rates(self) -> list[list[float]]:
        return [[group["lr"], group.get("momentum", group.get("betas", (0,))[0]), group["weight_decay"]]
                for group in self.optimizer.param_groups]

    def train(self, first: int, last: int) -> list[Any]:
        used = []
        for step in range(first, last):
            self.optimizer.zero_grad()
            self.model(torch.full((1, 3), 1.0 + step)).square().sum().backward()
            used.append(self.rates())
            self.optimizer.step()
            self.scheduler.step()
        return used


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_step(kind):
    used = Run(kind).train(0, STEPS)
    for step, (matrix, bias) in enumerate(used):
        momentum, decay = s.linear(STEPS, 0.95, 0.85)(step), s.step_decay(4, 0.5)(step)
        assert matrix == [0.1 * LR(step), momentum, 0.2 * decay]
        assert bias == [0.02 * LR(step), momentum, 0.0]


def test_it_is_torchs():
    run = Run()
    assert isinstance(run.scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert run.scheduler.get_last_lr() == run.scheduler.get_lr() == [0.1 * LR(0), 0.02 * LR(0)]
    assert run.scheduler.base_lrs == [0.1, 0.02]
    run.scheduler.step(5)
    assert run.scheduler.get_last_lr() == [0.1 * LR(5), 0.02 * LR(5)]
    assert not hasattr(run.optimizer.step, "_wrapped_by_lr_sched")
    with pytest.raises(ValueError, match="no value at step -1"):
        run.scheduler.step(-1)
    assert run.scheduler.last_epoch == 5
    copied = copy.deepcopy(run.scheduler)
    copied.step()
    copied.optimizer.load_state_dict(run.optimizer.state_dict())
    assert [one.get_lr()[0] for one in (run.scheduler, copied)] == [0.1 * LR(5), 0.1 * LR(6)]


ORDERS = [order for order in itertools.permutations(("schedule", "load optimizer", "load scheduler"))
          if order.index("schedule") < order.index("load scheduler")]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_built_and_loaded_in_any_order(kind, order):
    """Torch's SequentialLR, built after the optimizer was loaded, is wrong on every step from there."""
    straight = Run(kind)
    wanted = straight.train(0, STEPS)
    for stop in (1, 5, 9):
        stopped = Run(kind)
        stopped.train(0, stop)
        saved = copy.deepcopy([stopped.model.state_dict(), stopped.optimizer.state_dict()])
        state = json.loads(json.dumps(stopped.scheduler.state_dict()))
        resumed = Run(kind, scheduled=False)
        resumed.model.load_state_dict(saved[0])
        for what in order:
            if what == "schedule":
                resumed.schedule()
            elif what == "load optimizer":
                resumed.optimizer.load_state_dict(saved[1])
            else:
                resumed.scheduler.load_state_dict(state)
        assert resumed.train(stop, STEPS) == wanted[stop:]
        assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), straight.model.parameters(),
                                                     strict=True))


def test_without_its_state_at_a_given_step():
    assert Run(last_epoch=4).rates() == Run().train(0, 6)[5]


@pytest.mark.parametrize("given, wanted", [
    ([s.constant(0.5), None], [0.05, 0.02]), ({1: s.constant(0.5)}, [0.1, 0.01]),
    ({"bias": 0.5}, [0.1, 0.01]), (lambda step: 0.25, [0.025, 0.005]), (2.0, [0.2, 0.04])])
def test_by_group(given, wanted):
    run = Run(scheduled=False)
    run.optimizer.param_groups[1]["name"] = "bias"
    s.Scheduler(run.optimizer, lr=given)
    assert [group["lr"] for group in run.optimizer.param_groups] == wanted


def test_groups_that_come_later_follow():
    run = Run()
    run.train(0, 3)
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5})
    run.scheduler.step()
    assert run.optimizer.param_groups[2]["lr"] == 0.5 * LR(4)
    again = Run()
    again.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5})
    again.scheduler.step()
    again.scheduler.load_state_dict(run.scheduler.state_dict())
    assert again.rates()[2] == run.rates()[2]


def test_a_rate_that_is_a_tensor_and_other_numbers():
    rate = torch.tensor(0.5, dtype=torch.float64)
    optimizer = ours.AdamW([torch.nn.Parameter(torch.ones(2))], lr=rate, ema_decay=0.9)
    s.Scheduler(optimizer, lr=s.linear(4), ema_decay=s.linear(4, 0.5, 0.9)).step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.375
    assert optimizer.param_groups[0]["ema_decay"] == 0.6


def test_a_plateau_multiplies_and_is_saved():
    run = Run(plateau=s.Plateau(factor=0.5, patience=0))
    for metric in (1.0, 1.0, 0.5):
        run.scheduler.plateau.update(metric)
        run.scheduler.step()
    assert run.rates()[0][0] == 0.1 * LR(3) * 0.5
    other = Run(plateau=s.Plateau(factor=0.5, patience=0))
    other.scheduler.load_state_dict(json.loads(json.dumps(run.scheduler.state_dict())))
    assert other.rates() == run.rates()
    assert other.scheduler.plateau.best == 0.5
    with pytest.raises(ValueError, match="with a plateau, and this Scheduler has none"):
        Run().scheduler.load_state_dict(run.scheduler.state_dict())


# --- Other schedules than those that were saved -----------------------------------------------------------------------

def test_another_schedule_is_an_error_or_an_explicit_remap():
    stopped = Run()
    stopped.train(0, 6)
    longer = s.warmup_cosine(2 * STEPS, warmup=3, floor=0.1)
    run = Run(lr=longer)
    before = run.rates()
    with pytest.raises(ValueError, match=r"lr was warmup\(3\) \+ cosine\(9, floor=0.1\) and is warmup\(3\) \+ cos"):
        run.scheduler.load_state_dict(stopped.scheduler.state_dict())
    assert run.rates() == before
    for changed, step in (("step", 6), ("share", 12)):
        run = Run(lr=longer, changed=changed)
        with pytest.warns(UserWarning, match=f"Step 6 of the old is followed by step {step} of the new"):
            run.scheduler.load_state_dict(stopped.scheduler.state_dict())
        assert run.rates()[0][0] == 0.1 * longer(step)
        run.optimizer.load_state_dict(stopped.optimizer.state_dict())  # has the old rate: it does not come back
        assert run.rates()[0][0] == 0.1 * longer(step)
    with pytest.raises(ValueError, match="needs schedules with an end"):
        Run(lr=s.inverse_sqrt(5), changed="share").scheduler.load_state_dict(stopped.scheduler.state_dict())


def test_another_rate_is_told():
    stopped, run = Run(), Run(scheduled=False)
    run.optimizer.param_groups[1]["lr"] = 0.5
    run.schedule()
    with pytest.raises(ValueError, match=r"lr of group 1 was 0.02 and is 0.5"):
        run.scheduler.load_state_dict(stopped.scheduler.state_dict())


@pytest.mark.parametrize("options, error, message", [
    (dict(lr=None, momentum=None, weight_decay=None), ValueError, "no schedule is given"),
    (dict(lr="cosine"), TypeError, "is no schedule"),
    (dict(lr=[s.constant()]), ValueError, "1 schedules for 2 parameter groups"),
    (dict(lr={2: s.constant()}), ValueError, "there is no parameter group 2"),
    (dict(lr={"head": s.constant()}), ValueError, "there is no parameter group 'head'"),
    (dict(rate=s.constant()), ValueError, "rate: parameter group 0 of AdamW has no such option"),
    (dict(betas=s.constant()), ValueError, r"has betas=\(0.9, 0.999\), no number"),
    (dict(changed="ignore"), ValueError, "changed='ignore' is none of"),
    (dict(lr=lambda step: float("nan")), ValueError, "lr of parameter group 0 would be nan at step 0"),
])
def test_what_cannot_work_is_refused(options, error, message):
    run = Run(scheduled=False)
    before = run.rates()
    with pytest.raises(error, match=message):
        s.Scheduler(run.optimizer, **{**run.options, **options})
    assert run.rates() == before


@pytest.mark.parametrize("state", [{}, {"last_epoch": 4, "_step_count": 5}, {"step": 3}])
def test_states_of_something_else(state):
    with pytest.raises(ValueError, match=r"not one of a fasttrain\.schedules\.Scheduler"):
        Run().scheduler.load_state_dict(state)


# --- Around it --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scaler", [LossScaler, lambda scale: torch.amp.GradScaler("cpu", init_scale=scale)],
                         ids=["LossScaler", "GradScaler"])
def test_skipped_steps_count(scaler):
    run, scaler = Run(), scaler(2.0**10)
    for step in range(6):
        run.optimizer.zero_grad()
        loss = run.model(torch.ones(1, 3)).sum() * (float("inf") if step in (0, 3) else 1.0)
        scaler.scale(loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's say that a skipped first step is a mistake
            scaler.step(run.optimizer)
            if not isinstance(scaler, LossScaler):
                scaler.update()
            run.scheduler.step()
    assert scaler.get_scale() == 2.0**8
    assert run.optimizer.state[run.model.weight]["step"] == 4
    assert run.rates()[0][0] == 0.1 * LR(6)


@pytest.mark.parametrize("kind", [ours.AdamW, ours.SGD])
def test_captured_steps_have_the_values_of_each_replay(kind, monkeypatch):
    """The replay runs no Python of the optimizer: what the schedule wrote is sent before it."""
    monkeypatch.setattr(StepGraph, "recorder", Tape)
    ends = []
    for graphed in (False, True):
        p = torch.nn.Parameter(torch.ones(600))
        p.grad = torch.zeros_like(p)
        optimizer = kind([p], lr=0.1, backend="reference", capturable=True,
                         **({"momentum": 0.9} if kind is ours.SGD else {}))
        scheduler = s.Scheduler(optimizer, lr=LR, momentum=s.linear(STEPS, 0.95, 0.5), weight_decay=s.linear(STEPS))
        step = StepGraph(optimizer.step, optimizer, warmup=2) if graphed else optimizer.step
        for number in range(STEPS):
            p.grad.fill_(0.1 + 0.01 * number)
            step()
            scheduler.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def zero_run(wire: Any, order: tuple[str, ...]) -> list[Any]:
    from fasttrain.parallel import DataParallel, Zero

    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = DataParallel(torch.nn.Linear(8, 4), mesh=wire, broadcast_buffers=False)
        return model, Zero(model, ours.AdamW, stage=1, lr=0.1)

    def steps(model: Any, optimizer: Any, scheduler: Any, first: int, last: int) -> list[float]:
        used = []
        for step in range(first, last):
            model(torch.full((2, 8), 1.0 + step + wire.rank)).sum().backward()
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            assert optimizer.inner.param_groups[0]["lr"] == used[-1]
        return used

    model, optimizer = make()
    scheduler = s.Scheduler(optimizer, lr=LR)
    steps(model, optimizer, scheduler, 0, 5)
    whole, state = optimizer.consolidate(to=None), scheduler.state_dict()
    assert whole["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"] == 0.1 * LR(5)
    model, optimizer = make()
    for what in order:
        if what == "schedule":
            scheduler = s.Scheduler(optimizer, lr=LR)
        elif what == "load optimizer":
            optimizer.load_state_dict(whole)
        else:
            scheduler.load_state_dict(state)
    return steps(model, optimizer, scheduler, 5, STEPS)


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_zero_in_any_order(order):
    wanted = [0.1 * LR(step) for step in range(5, STEPS)]
    assert ranks.run(zero_run, 2, order) == [wanted, wanted]
