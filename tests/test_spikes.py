"""Loss spikes: what is one, and a loop that goes back and leaves the batches out."""

import copy
import json
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain import schedules as s
from fasttrain.guards import LossSpikes, spikes
from fasttrain.optim import SGD

NUMBERS = st.floats(-100, 100).map(lambda x: round(x, 3))


@given(st.lists(NUMBERS, min_size=4, max_size=40))
def test_the_median_distance(values):
    middle = statistics.median(values)
    wanted = statistics.median([abs(one - middle) for one in values])
    assert spikes._median_distance(sorted(values), middle) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@given(st.lists(NUMBERS, min_size=30, max_size=60), st.sampled_from(["mad", "z"]))
def test_scores_are_those_of_the_last_losses_that_were_no_spikes(values, method):
    guard = LossSpikes(window=8, warmup=4, threshold=5.0, method=method)
    kept = []
    for step, loss in enumerate(values):
        decision = guard.update(step, loss)
        window = kept[-8:]
        if len(window) < 4:
            assert decision == (False, 0.0, None, None, False, (), False)
        else:
            middle = statistics.median(window) if method == "mad" else statistics.fmean(window)
            deviation = (1.4826 * statistics.median([abs(one - middle) for one in window]) if method == "mad"
                         else statistics.pstdev(window))
            deviation = max(deviation, 1e-3 * abs(middle), 1e-30)
            assert decision.middle == pytest.approx(middle, rel=1e-9, abs=1e-9)
            assert decision.score == pytest.approx((loss - middle) / deviation, rel=1e-6, abs=1e-6)
            assert decision.spike == (decision.score > 5.0)
        if not decision.spike:
            kept.append(loss)


def test_a_window_of_spikes_does_not_become_usual():
    guard = LossSpikes(window=16, warmup=8)
    for step in range(20):
        guard.update(step, 2.0 + 0.01 * (step % 5))
    assert all(guard.update(20 + i, 9.0).spike for i in range(100))
    assert guard.update(200, math.nan).score == math.inf
    assert not guard.update(201, 2.02).spike
    assert not guard.update(202, -5.0).spike, "only what is above"


def test_patience_and_the_number_of_rollbacks():
    guard = LossSpikes(window=16, warmup=8, patience=2, most=1)
    for step in range(8):
        guard.update(step, 2.0)
    assert not guard.update(8, 9.0, "a").rollback
    assert guard.update(9, 9.0, "b")[3:] == (8, True, ("a", "b"), False)
    guard.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    guard.rolled_back()
    older = LossSpikes(window=16, warmup=8).state_dict()
    guard.load_state_dict(older)  # of a checkpoint from before: the rollback stays counted
    for step in range(8):
        guard.update(step, 2.0)
    guard.update(8, 9.0, "c")
    assert guard.update(9, 9.0, "d")[3:] == (8, False, ("c", "d"), True)


def test_a_loop_that_goes_back_ends_as_if_the_batch_had_not_been_there():
    """Checkpoint, decision, load, skip: the last weights are those of a run without that batch, to the bit."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, generator=generator) for _ in range(60)]
    batches[40] *= 1e4

    def run(skipped, guarded):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.5)
        scheduler = s.Scheduler(optimizer, lr=s.linear(100))
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        if guarded:
            parts["spikes"] = LossSpikes(window=32, warmup=16, patience=1)
        step = position = 0
        saved, rollbacks = None, 0
        while position < 60:
            if step % 8 == 0 and step:
                saved = step, position, copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
            if position in skipped:
                position += 1
                continue
            optimizer.zero_grad()
            loss = (model(batches[position]) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if guarded:
                decision = parts["spikes"].update(step, loss.item(), batch=position)
                if decision.rollback:
                    skipped = skipped | set(decision.skip)
                    step, position, states = saved
                    for name, part in parts.items():
                        part.load_state_dict(states[name])
                    parts["spikes"].rolled_back()
                    rollbacks += 1
                    continue
            step, position = step + 1, position + 1
        return [p.detach() for p in model.parameters()], rollbacks

    without, _ = run({40}, guarded=False)
    back, rollbacks = run(set(), guarded=True)
    assert rollbacks == 1
    assert all(torch.equal(a, b) for a, b in zip(without, back, strict=True))


@pytest.mark.parametrize("options, message", [
    (dict(window=2), "window=2"), (dict(warmup=300), "longer than window=128"), (dict(method="iqr"), "is none of"),
    (dict(threshold=0.0), "must be positive"), (dict(patience=0), "patience=0"), (dict(most=-1), "most=-1")])
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossSpikes(**options)
    with pytest.raises(ValueError, match="not one of LossSpikes"):
        LossSpikes().load_state_dict({"losses": []})
