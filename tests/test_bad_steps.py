"""Losses and gradients that are not finite: skipped, counted, named, and ended; without waiting for a device."""

import copy
import itertools
import json
import math

import pytest
import ranks
import torch

from fasttrain import LossScaler
from fasttrain import optim as ours
from fasttrain.guards import Later, NonFinite, TooManyBadSteps, bad_steps, nonfinite

OPTIMIZERS = {"AdamW": ours.AdamW, "SGD": ours.SGD, "Muon": ours.Muon, "torch.AdamW": torch.optim.AdamW,
              "torch.SGD": torch.optim.SGD}


def model_of() -> torch.nn.Sequential:
    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias=False))


class Run:
    """Trains on constant inputs; `spoilt` says in which steps something is not finite: the loss, or one gradient."""

    def __init__(self, name="AdamW", spoilt=(), kind="grad", most=10, scaler=None, max_norm=0.5, **options):
        self.model = model_of()
        self.optimizer = OPTIMIZERS[name](self.model.parameters(), lr=0.05)
        self.guard = NonFinite(self.model, most, **options)
        self.spoilt, self.kind, self.scaler, self.max_norm = spoilt, kind, scaler, max_norm
        self.judged = []

    def step(self, step):
        self.optimizer.zero_grad()
        loss = self.model(torch.full((2, 3), 1.0 + step)).square().mean()
        if step in self.spoilt and self.kind != "grad":
            loss = loss * float(self.kind)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if step in self.spoilt and self.kind == "grad":
            self.model[2].weight.grad[1, 2] = math.nan
        told = self.guard.step(self.optimizer, step, loss=loss, batch=[step, "batch"], max_norm=self.max_norm,
                               scaler=self.scaler)
        self.judged += [] if told is None else [told]

    def run(self, first, last):
        for step in range(first, last):
            self.step(step)
        return self

    def ends(self):
        return copy.deepcopy([*self.model.state_dict().values(),
                              *(state for one in self.optimizer.state.values() for state in one.values())])


@pytest.mark.parametrize("kind", ["grad", "nan", "inf"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_is_not_made_and_is_told_one_step_late(name, kind):
    run = Run(name, spoilt=(2, 3, 5), kind=kind)
    before = run.run(0, 2).ends()
    run.run(2, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, run.ends(), strict=True))
    run.run(4, 7)
    judged = [*run.judged, *run.guard.flush()]
    assert [one.step for one in judged] == list(range(7))
    assert [one.kind for one in judged] == ["good", "good", "bad", "bad", "good", "bad", "good"]
    assert [one.in_a_row for one in judged] == [0, 0, 1, 2, 0, 1, 0]
    assert judged[-1].skipped == 3
    culprits = ("2.weight",) if kind == "grad" else ("0.weight", "2.weight")
    for one in judged:
        assert one.batch == [one.step, "batch"]
        assert one.names == (() if one.kind == "good" else culprits)
    assert run.guard.last_good == 6
    assert [one["step"] for one in run.guard.bad] == [2, 3, 5]
    assert len(run.judged) == 6, "one step late"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_good_steps_have_the_bits_of_steps_without_a_guard(name):
    """Of ours: clipping and the step; torch's clip rewrites gradients, and does so here too."""
    run, model = Run(name).run(0, 5), model_of()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.05)
    for step in range(5):
        optimizer.zero_grad()
        model(torch.full((2, 3), 1.0 + step)).square().mean().backward()
        if hasattr(optimizer, "clip_grad_norm_"):
            optimizer.clip_grad_norm_(0.5)
        else:
            grads = [p.grad.double() for p in model.parameters()]
            norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt().float()
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
        optimizer.step()
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-7 if "torch" in name else 0, atol=0)  # the norm's sum in another order


def test_it_ends_with_a_report_and_the_last_good_state():
    run = Run(spoilt=range(3, 99), most=4)
    before = run.run(0, 3).ends()
    said = r"4 steps in a row .* after step 2: the last is step 6, batch \[6, 'batch'\].* not finite: 2.weight"
    with pytest.raises(TooManyBadSteps, match=said) as caught:
        run.run(3, 99)
    assert caught.value.last_good == 2
    assert [(one["step"], one["batch"]) for one in caught.value.report] == [(s, [s, "batch"]) for s in (3, 4, 5, 6)]
    assert json.loads(json.dumps(caught.value.report))[0]["parameters"] == ["2.weight"]
    assert all(torch.equal(a, b) for a, b in zip(before, run.ends(), strict=True))
    with pytest.raises(TooManyBadSteps, match="since the start"):
        Run(spoilt=range(9), most=2).run(0, 9)


def test_overflows_of_a_scale_that_backs_off_are_no_bad_steps():
    run = Run(scaler=LossScaler(2.0**3), spoilt=range(1, 99), most=2)
    with pytest.raises(TooManyBadSteps) as caught:
        run.run(0, 99)
    kinds = [one.kind for one in run.judged]
    assert kinds == ["good", "overflow", "overflow", "overflow", "bad"]  # at scales of 8, 8, 4, 2, 1
    assert run.guard.overflows == 3
    assert [one["step"] for one in caught.value.report] == [4, 5]
    run = Run(scaler=LossScaler(2.0**10), spoilt=(1,), kind="nan").run(0, 3)
    assert run.judged[1].kind == "bad", "the loss itself is not finite"
    assert run.scaler.get_scale() == 2.0**9


def test_torchs_optimizers_and_our_scaler():
    with pytest.raises(TypeError, match="LossScaler steps optimizers of fasttrain only"):
        Run("torch.SGD", scaler=LossScaler()).step(0)


def test_several_optimizers_are_skipped_together():
    model = model_of()
    both = [ours.SGD(model[0].parameters(), lr=0.1), ours.AdamW(model[2].parameters(), lr=0.1)]
    before = copy.deepcopy(model.state_dict())
    guard = NonFinite(model)
    model(torch.ones(1, 3)).sum().backward()
    model[0].weight.grad[0, 0] = math.inf
    guard.step(both, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert guard.flush()[0].names == ("0.weight",)


def test_state_goes_through_json_and_counts_what_was_not_told():
    run = Run(spoilt=(2, 3, 4, 5), most=3).run(0, 4)
    state = json.loads(json.dumps(run.guard.state_dict()))
    assert state["skipped"] == 2
    resumed = Run(spoilt=(2, 3, 4, 5), most=3)
    resumed.guard.load_state_dict(state)
    with pytest.raises(TooManyBadSteps) as caught:
        resumed.run(4, 7)
    assert [one["step"] for one in caught.value.report] == [2, 3, 4]
    with pytest.raises(ValueError, match="has no skipped, overflows, last_good, row, bad"):
        run.guard.load_state_dict({})


@pytest.mark.parametrize("most", [0, -1, 1.5, True])
def test_most_must_be_a_count(most):
    with pytest.raises(ValueError, match="most="):
        NonFinite(most=most)


def test_steps_on_arrival_cannot_be_skipped():
    run = Run()
    run.optimizer.step_on_arrival()
    with pytest.raises(RuntimeError, match="before anything can be skipped"):
        run.step(0)


def test_good_steps_read_no_sums_and_parameters_without_names_are_told_by_shape():
    guard, read = NonFinite(most=9), []
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 1))]

    class Sums:
        def tolist(self):
            read.append(1)
            return [1.0, math.nan]

    for step, found in enumerate((False, False, True)):
        guard.watch(step, found=found, loss=1.0, sums=[(params, Sums())])
    assert not read
    assert guard.flush()[0].names == ("a parameter of shape (3, 1)",)
    assert read == [1]


def test_known_statistics_have_no_sums_and_the_gradients_are_looked_at():
    run = Run()
    run.model(torch.ones(1, 3)).sum().backward()
    run.model[0].weight.grad[0, 0] = math.inf
    run.guard.step(run.optimizer, 0, statistics=run.optimizer.grad_statistics())
    assert run.guard.flush()[0].names == ("0.weight",)


def test_host_numbers_alone():
    guard = NonFinite(most=2)
    assert guard.update(0, False, 2.0).kind == "good"
    assert guard.update(1, False, math.inf, batch="b").kind == "bad"
    with pytest.raises(TooManyBadSteps, match="step 2"):
        guard.update(2, True, 1.0, names=["w"])
    assert guard.bad[0]["loss"] == "inf"


# --- As on a GPU ------------------------------------------------------------------------------------------------------

class Device:
    """Stands for `torch.cuda`: what is sent to the host is there when the test says so."""

    def __init__(self, monkeypatch):
        self.arrived, self.waited, self.sent = True, 0, 0
        monkeypatch.setattr("fasttrain.guards.later.send", self.send)

    def send(self, vector):
        self.sent += 1
        copied = torch.zeros(vector.shape, dtype=vector.dtype)  # of a tensor on "meta" there are no values
        return copied, lambda: self.arrived, self.wait

    def wait(self):
        self.waited += 1


def test_one_small_copy_a_step_and_no_wait_for_what_has_arrived(monkeypatch):
    device, later = Device(monkeypatch), Later(delay=2)
    ran = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    far = dict(loss=torch.empty((), device="meta"), flags=torch.empty(3, dtype=torch.bool, device="meta"))
    with Counting():
        assert later.put(0, "a", **far, scale=2.0) is None
    views = ("view", "_unsafe_view", "detach", "zeros")
    assert [one for one in ran if one not in views] == ["_to_copy", "cat"]
    assert later.put(1, "b", **far, scale=3.0) is None
    assert later.put(2, "c", **far) == (0, {"loss": 0.0, "flags": [0.0, 0.0, 0.0], "scale": 2.0}, "a")
    assert (device.sent, device.waited, later.waits) == (3, 0, 0)
    device.arrived = False
    assert later.put(3, **far).step == 1
    assert (device.waited, later.waits) == (1, 1)
    assert [one.step for one in later.flush()] == [2, 3]


def test_culprits_are_looked_for_after_a_bad_step_until_a_good_one(monkeypatch):
    """On a GPU a look costs a pass over the gradients: good steps take none."""
    looks = []
    found = torch.tensor(True)
    guard = NonFinite(model_of(), most=9)
    monkeypatch.setattr(bad_steps, "nonfinite", lambda named: pytest.fail("waits for the device"))
    fake = type("Found", (), {"device": torch.device("cuda", 0)})()

    def look(step, bad):
        monkeypatch.setattr(torch, "zeros", lambda *a, **k: torch.tensor(False))  # no such device here
        names, flags = guard._look(fake)
        monkeypatch.undo()
        looks.append(flags is not None)
        assert names == []
        return guard.watch(step, found=found if bad else ~found, loss=1.0, flags=flags if bad else None)

    for step, bad in enumerate([False, True, True, False, False, False]):
        look(step, bad)
    # Step 1 is bad, which is known after step 2: looked at in steps 3 and 4; step 3 was good, known after step 4.
    assert looks == [False, False, False, True, True, False]


# --- Ranks ------------------------------------------------------------------------------------------------------------

def overflow_on_one_rank(wire):
    from fasttrain.parallel import DataParallel

    torch.manual_seed(0)
    model = DataParallel(torch.nn.Linear(8, 4), mesh=wire, broadcast_buffers=False)
    optimizer, scaler = ours.AdamW(model.parameters()), LossScaler(2.0**10)
    guard, scales, weights = NonFinite(model, most=3), [], []
    for step in range(5):
        loss = model(torch.ones(2, 8)).sum()
        (scaler.scale(loss) * (math.inf if wire.rank == 1 and step in (1, 2) else 1.0)).backward()
        guard.step(optimizer, step, statistics=model.reducer.statistics(), scaler=scaler)
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        weights.append(model.module.weight.detach().clone())
    moved = [not torch.equal(p, q) for p, q in itertools.pairwise(weights)]
    return scales, moved, guard.state_dict()["overflows"]


def test_an_overflow_on_one_rank_is_skipped_on_all_and_the_scale_backs_off():
    wanted = ([1024.0, 512.0, 256.0, 256.0, 256.0], [False, False, True, True], 2)
    assert ranks.run(overflow_on_one_rank, 2) == [wanted, wanted]


def spoil_one_rank(wire, zero):
    from fasttrain.parallel import DataParallel, Zero

    torch.manual_seed(0)
    model = DataParallel(torch.nn.Linear(8, 4), mesh=wire, broadcast_buffers=False)
    optimizer = Zero(model, ours.AdamW, stage=2) if zero else ours.AdamW(model.parameters())
    guard = NonFinite(model, most=3, culprits=lambda: model.reducer.culprits)
    kinds, ends = [], None
    try:
        for step in range(12):
            loss = model(torch.ones(2, 8)).sum()
            loss.backward() if not (wire.rank == 1 and step >= 4) else (loss * math.nan).backward()
            judged = guard.step(optimizer, step, max_norm=1.0, statistics=model.reducer.statistics())
            kinds.append(judged and judged.kind)
            optimizer.zero_grad()
            if step == 3:
                ends = [p.detach().clone() for p in model.parameters()]
    except TooManyBadSteps as error:
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), ends, strict=True))
        return kinds, [one["step"] for one in error.report], error.report[-1]["parameters"], same
    pytest.fail("it did not end")


@pytest.mark.parametrize("zero", [False, True])
def test_nan_on_one_rank_ends_all_in_the_same_step_and_names_it(zero):
    results = ranks.run(spoil_one_rank, 2, zero)
    assert results[0][:2] == results[1][:2]
    for kinds, steps, names, same in results:
        assert kinds == [None, *["good"] * 4, "bad", "bad"]
        assert steps == [4, 5, 6]
        assert {"weight (rank 1)", "bias (rank 1)"} <= set(names)
        assert same


def test_sparse_and_absent_gradients_are_looked_at():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1, 1])).mul(math.inf).sum().backward()
    other = torch.nn.Parameter(torch.ones(2))
    assert nonfinite([("table", table.weight), ("other", other)]) == ["table"]
