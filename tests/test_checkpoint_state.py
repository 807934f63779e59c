"""What a checkpoint holds of one process: names, values, ties, orders of loading; what is refused, in which words."""

from __future__ import annotations

import re
from collections import Counter, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import assert_same
from helpers import assert_same_bits
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fasttrain import LossScaler, optim
from fasttrain.checkpoint import Checkpointer, Mismatch, NoSpace, PerRank, Reader, Rng, encoding
from fasttrain.checkpoint.names import strip


def net(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def stepped(model: nn.Module, optimizer: Any, steps: int = 2, schedule: Any = None) -> None:
    for number in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def save(folder: Path, state: Any, step: int = 1, **options: Any) -> Path:
    with Checkpointer(folder, **options) as checkpoints:
        path = checkpoints.save(step, state).wait()
    assert path is not None
    return path


def load(folder: Path, state: Any, **options: Any) -> Any:
    with Checkpointer(folder) as checkpoints:
        return checkpoints.load(state, **options)


# --- Names ------------------------------------------------------------------------------------------------------------

def test_wrappers_do_not_show_in_names(tmp_path: Path) -> None:
    model = net()
    model[0] = checkpoint_wrapper(model[0])  # type: ignore[assignment]
    model[2] = torch.compile(model[2])  # type: ignore[assignment]
    wrapped = nn.DataParallel(torch.compile(model))  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    stepped(nn.Sequential(*(getattr(part, "_orig_mod", part) for part in model)), optimizer)
    path = save(tmp_path, {"model": wrapped, "optimizer": optimizer})
    bare = net()
    names = {f"model/{name}" for name in bare.state_dict()}
    names |= {f"optimizer/{name}/momentum_buffer" for name, _ in bare.named_parameters()}
    assert set(Reader(path).tensors) == names
    load(tmp_path, {"model": bare, "optimizer": torch.optim.SGD(bare.parameters(), lr=0.1)})
    for mine, theirs in zip(bare.state_dict().values(), model.state_dict().values(), strict=True):
        assert_same_bits(mine, theirs)


def test_a_module_of_the_users_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "inner": nn.DataParallel(nn.Linear(2, 2))})
    path = save(tmp_path, {"model": model})
    assert sorted(Reader(path).tensors) == ["model/inner.bias", "model/inner.weight", "model/module.bias",
                                            "model/module.weight"]
    assert strip("module.module.0.weight") == "0.weight"


def test_two_models_of_one_optimizer_and_names_without_a_model(tmp_path: Path) -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    both = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1, momentum=0.9)
    (one(torch.ones(1, 2)) + two(torch.ones(1, 2))).sum().backward()
    both.step()
    path = save(tmp_path, {"one": one, "two": two, "optimizer": both})
    assert "optimizer/two.weight/momentum_buffer" in Reader(path).tensors
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \(shape \(2, 2\)\) has no name"):
        save(tmp_path, {"optimizer": both})
    named = optim.AdamW(one.named_parameters())
    named.step()
    assert "optimizer/weight/exp_avg" in Reader(save(tmp_path, {"optimizer": named}, 2)).tensors


def test_tied_parameters_are_saved_once(tmp_path: Path) -> None:
    def tied(together: bool) -> nn.Sequential:
        model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
        if together:
            model[1].weight = model[0].weight
        return model

    model = tied(True)
    path = save(tmp_path / "tied", {"model": model})
    assert list(Reader(path).tensors) == ["model/0.weight"]
    for together in (True, False):
        other = tied(together)
        load(tmp_path / "tied", {"model": other})
        assert_same_bits(other[0].weight, model[0].weight)
        assert_same_bits(other[1].weight, model[0].weight)
    save(tmp_path / "apart", {"model": tied(False)})
    with pytest.raises(Mismatch, match=r"tied in the model and apart in the checkpoint: 0\.weight and 1\.weight"):
        load(tmp_path / "apart", {"model": tied(True)})


# --- Values -----------------------------------------------------------------------------------------------------------

def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    value = {"floats": [0.1, float("inf"), -float("inf"), -0.0, 5e-324], "large": 2**63 + 1, "negative": -2**77,
             "tuple": (1, (2, [3])), 7: "a number as key", "$": "a dollar", "none": None, "yes": True,
             "counter": Counter({3: 1}), "deque": deque([1, 2], 5), "bytes": b"\x00\xff", "dtype": torch.bfloat16,
             "complex": complex(1, float("inf")), "text": "naïve \ud800 \u2028", "size": torch.Size([2])}
    loaded = (save(tmp_path, {"value": value, "tensor": {"inside": [torch.arange(3)]}}), load(tmp_path, {}))[1].values
    got = loaded["value"]
    assert got == {**value, "size": (2,)}
    assert str(got["floats"]) == str(value["floats"])
    assert [type(got[key]) for key in ("counter", "deque", "tuple")] == [Counter, deque, tuple]
    assert got["deque"].maxlen == 5
    assert_same_bits(loaded["tensor"]["inside"][0], torch.arange(3))
    nan = encoding.decode(encoding.encode(float("nan")))
    assert nan != nan


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        for value, words in (({"callbacks": [1, print]}, "config/callbacks/1 is a builtins.builtin_function_or_method"),
                             (object(), "config is a builtins.object"), ({1, 2}, "config is a builtins.set"),
                             (torch.zeros(2, dtype=torch.complex128), "config is torch.complex128")):
            with pytest.raises(TypeError, match=re.escape(words)):
                checkpoints.save(1, {"config": value})
        with pytest.raises(ValueError, match="'a/b' is no key of a state"):
            checkpoints.save(1, {"a/b": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


class Extra(nn.Module):
    """A module whose state is more than tensors, one whose state dict is a copy, and numbers beside them."""

    def __init__(self, count: int):
        super().__init__()
        self.weight, self.count = nn.Parameter(torch.full((2,), float(count))), count
        self.register_state_dict_post_hook(lambda module, found, prefix, local: found.update(
            {f"{prefix}weight": found[f"{prefix}weight"].clone()}))

    def get_extra_state(self) -> Any:
        return {"count": self.count, "by": torch.tensor([self.count])}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"] + int(state["by"])


def test_extra_state_and_copies(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.Sequential(Extra(3))})
    model = nn.Sequential(Extra(1))
    load(tmp_path, {"model": model})
    assert model[0].count == 6
    assert model[0].weight.tolist() == [3.0, 3.0]


# --- Schedules and scalers --------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Any] = {
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(o, [
        torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)],
        [3]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "multi-step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 7]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
}


@pytest.mark.parametrize("order", ["together", "optimizer, build, schedule", "schedule, optimizer"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_exact_in_any_order(name: str, order: str, tmp_path: Path) -> None:
    def made(build: bool = True) -> tuple[Any, Any, Any]:
        torch.manual_seed(0)
        model = net()
        optimizer = optim.AdamW(model.named_parameters(), lr=0.01)
        return model, optimizer, SCHEDULES[name](optimizer) if build else None

    model, optimizer, schedule = made()
    stepped(model, optimizer, 4, schedule)
    save(tmp_path, {"optimizer": optimizer, "schedule": schedule})
    other, mine, again = made(order != "optimizer, build, schedule")
    if order == "together":
        load(tmp_path, {"schedule": again, "optimizer": mine})
    elif order == "schedule, optimizer":
        load(tmp_path, {"schedule": again})
        load(tmp_path, {"optimizer": mine})
    else:
        load(tmp_path, {"optimizer": mine})
        again = SCHEDULES[name](mine)  # writes its first rates into the groups
        load(tmp_path, {"schedule": again})
    for _ in range(6):
        for key in ("lr", "betas"):
            assert [group[key] for group in mine.param_groups] == [group[key] for group in optimizer.param_groups]
        stepped(model, optimizer, 1, schedule)
        stepped(other, mine, 1, again)


def test_a_schedule_of_another_length_is_told(tmp_path: Path) -> None:
    """torch's schedules take over what was saved; that they do is said."""
    def made(length: int) -> Any:
        optimizer = optim.SGD(net().parameters(), lr=0.1)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [
            torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)], [3])

    save(tmp_path, {"schedule": made(20)})
    with pytest.warns(UserWarning, match="schedule: T_max is 20 in the checkpoint and 100 here: it goes on as the"):
        load(tmp_path, {"schedule": made(100)})


def test_loss_scaler_and_plateau(tmp_path: Path) -> None:
    model = net()
    optimizer, scaler = optim.SGD(model.parameters(), lr=0.1), LossScaler(2.0**10)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    scaler.update(torch.tensor(True))
    for loss in (1.0, 2.0, 2.0):
        plateau.step(loss)
    save(tmp_path, {"scaler": scaler, "plateau": plateau})
    again = torch.optim.lr_scheduler.ReduceLROnPlateau(optim.SGD(net().parameters(), lr=0.1), patience=1)
    other = LossScaler()
    load(tmp_path, {"scaler": other, "plateau": again})
    assert other.get_scale() == 512.0
    assert (again.best, again.num_bad_epochs) == (1.0, plateau.num_bad_epochs)
    assert again.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


# --- Refused ----------------------------------------------------------------------------------------------------------

def test_another_model_is_refused_with_names_and_shapes(tmp_path: Path) -> None:
    save(tmp_path, {"model": net(), "optimizer": optim.AdamW(net().parameters())} | {"optimizer": 1})
    other = nn.Sequential(nn.Linear(4, 9), nn.Identity(), nn.Linear(9, 2), nn.Linear(2, 2).half())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(Mismatch) as refused:
        load(tmp_path, {"model": other, "scaler": LossScaler(), "rng": Rng()})
    text = str(refused.value)
    for words in ("missing in the checkpoint: 3.weight (2, 2), 3.bias (2,)",
                  "unexpected, the model has no: 1.bias (8,), 1.num_batches_tracked ()",
                  "different: 0.weight (9, 4) F32 (the checkpoint's is (8, 4) F32)",
                  "scaler: the checkpoint has no object of this name", "rng: the checkpoint has no object"):
        assert words in text
    assert_same(other.state_dict(), before)


@pytest.mark.parametrize("made, words", [
    (lambda p: optim.Lion(p), "the checkpoint's is AdamW, the one to load is Lion"),
    (lambda p: optim.AdamW(p, storage="8-byte"),
     "was kept with master='split', state_dtype='bf16', the optimizer's with"),
    (lambda p: optim.AdamW(p), "the optimizer's with the defaults"),
    (lambda p: torch.optim.AdamW(p),
     "the checkpoint's was kept with master='split', state_dtype='bf16', which torch's AdamW does not know"),
])
def test_another_optimizer_or_storage_is_refused(made: Any, words: str, tmp_path: Path) -> None:
    model = net().bfloat16()
    optimizer = optim.AdamW(model.parameters(), storage="10-byte")
    stepped(model, optimizer)
    save(tmp_path, {"model": model, "optimizer": optimizer})
    other = net().bfloat16()
    mine = made(other.parameters())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(Mismatch, match=re.escape(words)):
        load(tmp_path, {"model": other, "optimizer": mine})
    assert_same(other.state_dict(), before)
    assert not mine.state


def test_averages_in_the_place_of_the_weights_are_not_saved(tmp_path: Path) -> None:
    model = net()
    optimizer = optim.AdamW(model.parameters(), ema_decay=0.9)
    stepped(model, optimizer)
    with (Checkpointer(tmp_path) as checkpoints, optimizer.ema_weights(),
          pytest.raises(RuntimeError, match="are their EMA")):
        checkpoints.save(1, {"model": model, "optimizer": optimizer})


def test_digits_that_wait_for_the_first_step(tmp_path: Path) -> None:
    """A run that starts from fp32 weights and is saved before its first step."""
    weights = [torch.randn(p.shape) for p in net().parameters()]
    made = []
    for place in ("saved", "loaded"):
        torch.manual_seed(1)
        model = net().bfloat16()
        optimizer = optim.AdamW(model.parameters(), master="split")
        if place == "saved":
            optimizer.load_full_precision(weights)
            save(tmp_path, {"model": model, "optimizer": optimizer})
        else:
            load(tmp_path, {"model": model, "optimizer": optimizer})
        stepped(model, optimizer, 1)
        made.append(optimizer.full_precision())
    for mine, theirs in zip(*made, strict=True):
        assert_same_bits(mine, theirs)


def test_fp32_states_of_16_bit_parameters_keep_their_dtype_in_torchs_optimizers(tmp_path: Path) -> None:
    model = net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.randn(p.shape)
    save(tmp_path, {"model": model, "optimizer": optimizer})
    other = net().bfloat16()
    mine = torch.optim.SGD(other.parameters(), lr=0.5)
    load(tmp_path, {"model": other, "optimizer": mine})
    assert mine.param_groups[0]["lr"] == 0.1
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_bits(mine.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])


def test_lists_of_tensors_in_a_state(tmp_path: Path) -> None:
    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure_of(model: Any, optimizer: Any) -> Any:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = (model(torch.ones(2, 3)) - 1).square().sum()
            loss.backward()
            return loss
        return closure

    model, optimizer = made()
    optimizer.step(closure_of(model, optimizer))
    save(tmp_path, {"model": model, "optimizer": optimizer})
    other, mine = made()
    load(tmp_path, {"model": other, "optimizer": mine})
    for one, two in ((model, optimizer), (other, mine)):
        two.step(closure_of(one, two))
    assert_same(other.state_dict(), model.state_dict())


def test_per_rank_objects_say_so(tmp_path: Path) -> None:
    scaler = LossScaler()
    save(tmp_path, {"data": PerRank(scaler)})
    with pytest.raises(Mismatch, match="every rank has one of its own, and here the same"):
        load(tmp_path, {"data": scaler})
    load(tmp_path, {"data": PerRank(LossScaler())})


def test_too_little_space_is_seen_before_the_first_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttrain.checkpoint.space.free_bytes", lambda path: 100)
    with Checkpointer(tmp_path) as checkpoints, pytest.raises(NoSpace, match="and 100 are free"):
        checkpoints.save(1, {"model": net()})
