"""Accelerate with our optimizer, against the same run with torch's: accumulation, clipping, skips, checkpoints."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import F32, F64, OURS, PAIRS, Make, assert_close_run, batches, follow, model_of, named, squared_error
from helpers import assert_same_run
from torch import Tensor

pytest.importorskip("accelerate", reason="needs accelerate (pip install fasttrain[clients])")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    """Accelerate keeps the precision and the accumulation of the first Accelerator of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Run:
    """A training script as Accelerate's documents write it."""

    def __init__(self, make: Make, dtype: torch.dtype = F64, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        model = model_of(dtype)
        bare = make(model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(bare, STEPS)
        data = torch.utils.data.DataLoader(batches(2 * STEPS, dtype), batch_size=None)
        self.model, self.optimizer, self.schedule, self.data = self.accelerator.prepare(model, bare, schedule, data)
        self.bare = bare

    def train(self, first: int = 0, last: int = STEPS) -> list[float]:
        """Steps from the first to the last, exclusive; returns the learning rates."""
        rates = []
        for i, batch in enumerate(self.data):
            if not 2 * first <= i < 2 * last:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(squared_error(self.model, batch))
                if self.accelerator.sync_gradients:
                    rates.append(self.optimizer.param_groups[0]["lr"])
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                assert not self.optimizer.step_was_skipped
                self.schedule.step()
                self.optimizer.zero_grad()
        return rates

    def ends(self) -> dict[str, Tensor]:
        return named(self.model, self.bare)


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_ends_as_with_torch(name: str) -> None:
    ours, theirs = (Run(make) for make in PAIRS[name])
    rates = [run.train() for run in (ours, theirs)]
    assert_close_run(ours.ends(), theirs.ends())
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == STEPS
    assert isinstance(ours.optimizer, AcceleratedOptimizer)
    assert ours.optimizer.state is ours.bare.state
    assert ours.optimizer.param_groups is ours.bare.param_groups


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_step_is_torchs(name: str, precision: str) -> None:
    run = Run(OURS[name], F32, mixed_precision=precision)
    steps = follow(run.bare, PAIRS[name][1])
    run.train()
    assert steps == [6] * STEPS


@pytest.mark.parametrize("name", PAIRS)
def test_a_saved_and_loaded_run_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    straight = Run(OURS[name])
    straight.train()
    stopped = Run(OURS[name])
    stopped.train(0, 3)
    stopped.accelerator.save_state(str(tmp_path))
    resumed = Run(OURS[name])
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(3)
    assert_same_run(resumed.ends(), straight.ends(), name)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_wrapped_optimizer_is_copied_with_its_states(name: str, way: Any) -> None:
    run = Run(OURS[name])
    run.train(0, 3)  # by the end of the schedule the rate is zero
    other = way(run.optimizer)
    assert type(other.optimizer) is type(run.bare)
    copied = [p for group in other.param_groups for p in group["params"]]
    original = list(run.model.parameters())
    assert copied[0] is not original[0]
    before = copied[0].detach().clone()
    for optimizer, params in ((other, copied), (run.optimizer, original)):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert not torch.equal(copied[0], before)
    got, wanted = ({str(i): p.detach() for i, p in enumerate(params)} for params in (copied, original))
    assert_same_run(got, wanted, name)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", PAIRS)
def test_a_skipped_step_is_noticed(name: str, fused: bool | None) -> None:
    """Accelerate watches whether torch's GradScaler calls `step`; a fused step is called, and skips by itself."""
    seen = []
    for make in PAIRS[name]:
        Accelerator(cpu=True)
        model = model_of()
        bare = make(model.parameters(), fused=fused)
        optimizer = AcceleratedOptimizer(bare, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
        skipped = []
        for i, batch in enumerate(batches(3)):
            loss = squared_error(model, batch)
            optimizer.scaler.scale(loss * float("inf") if i == 1 else loss).backward()
            before = named(model, bare)
            optimizer.step()
            optimizer.zero_grad()
            skipped.append(optimizer.step_was_skipped)
            if i == 1:
                assert_same_run(named(model, bare), before, "a skipped step")
        seen.append((skipped, named(model, bare)))
    assert seen[0][0] == seen[1][0] == [False, not fused, False]
    assert_close_run(seen[0][1], seen[1][1])
