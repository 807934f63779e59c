"""Lightning with our optimizer, against the same run with torch's: automatic and manual optimization."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import F32, F64, OURS, PAIRS, Make, assert_close_run, batches, follow, model_of, named, squared_error
from helpers import assert_same_run
from torch import Tensor

pytest.importorskip("lightning", reason="needs lightning (pip install fasttrain[clients])")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of each other's deprecations
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

pytestmark = [pytest.mark.usefixtures("one_thread"),
              # Lightning's advice: a logger, more workers; and its own deprecations.
              *map(pytest.mark.filterwarnings, ("ignore::UserWarning:lightning", "ignore::DeprecationWarning",
                                                "ignore::FutureWarning"))]
STEPS = 6


class Automatic(LightningModule):
    def __init__(self, make: Make, dtype: torch.dtype, different: int = STEPS // 2) -> None:
        super().__init__()
        self.make = make
        self.different = different  # number of different batches
        self.model = model_of(dtype)
        self.rates: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return squared_error(self.model, batch)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS + 1)  # momentum or beta1 too
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(Automatic):
    """Two optimizers, each stepped with a closure."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        for optimizer in self.optimizers():
            def closure(optimizer: Any = optimizer) -> Tensor:
                loss = squared_error(self.model, batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=0.5)
                return loss

            assert optimizer.step(closure=closure) is not None

    def configure_optimizers(self) -> Any:
        return [self.make(self.model[0].parameters()), self.make(self.model[1:].parameters())]


def trainer_of(folder: Path, steps: int = STEPS, **options: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_progress_bar=False,
                   enable_model_summary=False, default_root_dir=folder, **options)


def fit(module: Automatic, trainer: Trainer, **options: Any) -> dict[str, Tensor]:
    """Train for two epochs; returns weights and states."""
    data = batches(module.different, next(module.parameters()).dtype)
    data *= STEPS // 2 * trainer.accumulate_grad_batches // len(data)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), **options)
    states: dict[str, Tensor] = {}
    for optimizer in trainer.optimizers:
        states |= named(module.model, optimizer)
    return states


AUTOMATIC = dict(accumulate_grad_batches=2, gradient_clip_val=0.5)


@pytest.mark.parametrize("name", PAIRS)
def test_automatic_optimization_ends_as_with_torch(name: str, tmp_path: Path) -> None:
    ours, theirs = (Automatic(make, F64) for make in PAIRS[name])
    got, wanted = (fit(module, trainer_of(tmp_path, precision="64-true", **AUTOMATIC)) for module in (ours, theirs))
    assert_close_run(got, wanted)
    assert ours.rates == theirs.rates
    assert len(set(ours.rates)) == STEPS


@pytest.mark.parametrize("name", PAIRS)
def test_manual_optimization_with_closures_ends_as_with_torch(name: str, tmp_path: Path) -> None:
    got, wanted = (fit(Manual(make, F64), trainer_of(tmp_path, precision="64-true")) for make in PAIRS[name])
    assert_close_run(got, wanted)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_step_is_torchs(name: str, precision: str, tmp_path: Path) -> None:
    """With 16-mixed Lightning calls torch's GradScaler."""
    ours, theirs = PAIRS[name]
    steps: list[int] = []

    def followed(params: Any) -> torch.optim.Optimizer:
        nonlocal steps
        optimizer = ours(params)
        steps = follow(optimizer, theirs)
        return optimizer

    fit(Automatic(followed, F32), trainer_of(tmp_path, precision=precision, **AUTOMATIC))
    assert steps == [6] * STEPS


@pytest.mark.parametrize("name", PAIRS)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    """In the middle of a schedule. Every batch is the same one: whatever the optimizer, a resumed Lightning 2.6 first
    takes one batch of the epoch that was complete, and where it accumulates it steps after that one.
    """
    options = dict(precision="64-true", gradient_clip_val=0.5)
    each = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)
    straight = fit(Automatic(OURS[name], F64, 1), trainer_of(tmp_path, callbacks=[each], **options))
    resumed = fit(Automatic(OURS[name], F64, 1), trainer_of(tmp_path, **options), ckpt_path=tmp_path / "epoch=0.ckpt",
                  weights_only=True)
    assert_same_run(resumed, straight, name)
