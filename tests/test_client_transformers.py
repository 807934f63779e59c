"""transformers' Trainer with our optimizer, against the same Trainer with torch's: a tiny Llama on random tokens."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import F32, F64, OURS, PAIRS, Make, assert_close_run, follow, named
from helpers import assert_same_run

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate (pip install fasttrain[clients])")
transformers = pytest.importorskip("transformers", reason="needs transformers (pip install fasttrain[clients])")

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


def llama(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
                                      pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config).to(dtype)


def texts() -> list[dict[str, torch.Tensor]]:
    numbers = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 32, (40, 12), generator=numbers)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(make: Make, dtype: torch.dtype, folder: Path, **options: Any) -> Any:
    model = llama(dtype)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=0.5, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        **options)
    return transformers.Trainer(model, arguments, train_dataset=texts(), optimizers=(optimizer, schedule))


def ends(trainer: Any) -> dict[str, torch.Tensor]:
    return named(trainer.model, trainer.optimizer.optimizer)  # Trainer has wrapped it by Accelerate


def logged(trainer: Any, key: str) -> torch.Tensor:
    numbers = [row[key] for row in trainer.state.log_history if key in row]
    assert len(numbers) == STEPS
    return torch.tensor(numbers, dtype=F64)


@pytest.mark.parametrize("name", PAIRS)
def test_trainer_ends_as_with_torch(name: str, tmp_path: Path) -> None:
    """Accumulation, clipping and a schedule."""
    ours, theirs = (trainer_of(make, F64, tmp_path) for make in PAIRS[name])
    for trainer in (ours, theirs):
        trainer.train()
    # Llama's norms and loss round to fp32 inside: a number that falls to the other side of a tie is worth 6e-8 there.
    assert_close_run(ends(ours), ends(theirs), 1e-8)
    assert torch.equal(logged(ours, "learning_rate"), logged(theirs, "learning_rate"))
    for key in ("loss", "grad_norm"):
        torch.testing.assert_close(logged(ours, key), logged(theirs, key), rtol=1e-6, atol=0)  # logged as fp32
    assert logged(ours, "grad_norm").max() > 0.5  # something was clipped


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_step_of_a_trainer_is_torchs(name: str, bf16: bool, tmp_path: Path) -> None:
    trainer = trainer_of(OURS[name], F32, tmp_path, bf16=bf16)
    steps = follow(trainer.optimizer, PAIRS[name][1])
    trainer.train()
    assert steps == [len(list(trainer.model.parameters()))] * STEPS


@pytest.mark.parametrize("name", PAIRS)
def test_a_resumed_trainer_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    straight = trainer_of(OURS[name], F32, tmp_path / "straight")
    straight.train()
    stopped = trainer_of(OURS[name], F32, tmp_path / "stopped")
    stopped.args.save_strategy, stopped.args.save_steps = "steps", STEPS // 2
    stopped.train()
    resumed = trainer_of(OURS[name], F32, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{STEPS // 2}"))
    assert resumed.state.global_step == STEPS
    assert_same_run(ends(resumed), ends(straight), name)
