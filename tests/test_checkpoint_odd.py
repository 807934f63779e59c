"""States that are not as one expects them: what is odd about a tensor, a name, a value, a call, is kept or told."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttrain import optim
from fasttrain.checkpoint import (
    Checkpointer,
    Keep,
    Mismatch,
    NotACheckpoint,
    complete,
    export_dcp,
    export_torch,
    import_dcp,
    load,
    load_torch,
    loading,
)


def moved(folder: Path, state: Any, into: Any, staging: str = "memory") -> Any:
    with Checkpointer(folder, staging=staging) as checkpoints:
        checkpoints.save(1, state).wait()
        return checkpoints.load(into)


class WithBuffer(nn.Module):
    def __init__(self, buffer: Tensor):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("buffer", buffer)


class WithExtra(nn.Linear):
    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


# --- Tensors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("staging", ["memory", "none"])
@pytest.mark.parametrize("made", [
    lambda z: z.conj(), lambda z: z[:1].conj().imag, lambda z: z.real.expand(3, 5), lambda z: z[::2]])
def test_elements_and_not_their_memory_are_saved(made: Callable[[Tensor], Tensor], staging: str,
                                                 tmp_path: Path) -> None:
    """Conjugates and negatives are marks on memory that holds something else; what is expanded has less memory."""
    one, other = WithBuffer(made(torch.randn(5, dtype=torch.complex64))), WithBuffer(made(torch.zeros(5) + 0j))
    wanted = one.buffer.clone()  # type: ignore[operator]
    loaded = moved(tmp_path, {"model": one, "value": one.buffer}, {"model": other, "value": None}, staging)
    assert torch.equal(other.buffer, wanted)  # type: ignore[arg-type]
    assert torch.equal(loaded.values["value"], wanted)


@pytest.mark.parametrize(("model", "words"), [
    (lambda: nn.Linear(2, 3, device="meta"), r"model/weight is on the meta device: .*to_empty"),
    (lambda: nn.LazyLinear(3), "model/weight has no shape yet .*run a batch")])
def test_a_model_without_memory_is_refused(model: Callable[[], nn.Module], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        moved(tmp_path / "saved", {"model": model()}, {})
    with pytest.raises(ValueError, match=words):
        moved(tmp_path / "loaded", {"model": nn.Linear(2, 3)}, {"model": model()})


# --- Models and optimizers --------------------------------------------------------------------------------------------

def test_extra_state_is_found_behind_wrappers_and_may_be_a_tensor_of_any_length(tmp_path: Path) -> None:
    one, other = (nn.Sequential(WithExtra(2, 2), WithExtra(2, 2)) for _ in range(2))
    one[0].extra, one[1].extra, other[1].extra = {"scale": 5}, torch.arange(7), torch.zeros(0)  # type: ignore
    other[0] = torch.compile(other[0])  # type: ignore[assignment]
    moved(tmp_path, {"model": one}, {"model": other})
    assert other[0]._orig_mod.extra == {"scale": 5}  # type: ignore[operator, union-attr]
    assert torch.equal(other[1].extra, torch.arange(7))  # type: ignore[arg-type]
    torch.save(one.state_dict(), tmp_path / "model.pt")
    other[1].extra = torch.zeros(0)  # type: ignore[assignment]
    torch.save({"model": one.state_dict()}, tmp_path / "model.pt")
    load_torch(tmp_path / "model.pt", {"model": other})
    assert torch.equal(other[1].extra, torch.arange(7))  # type: ignore[arg-type]


def test_extra_state_that_the_model_lacks_changes_nothing(tmp_path: Path) -> None:
    one, other = WithExtra(2, 2), nn.Linear(2, 2)
    one.extra, before = {"scale": 5}, other.weight.clone()
    with pytest.raises(Mismatch, match="unexpected, the model has no: _extra_state"):
        moved(tmp_path, {"model": one}, {"model": other})
    assert torch.equal(other.weight, before)


def test_odd_names_survive_every_format(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("a/b", "ü µ", "x" * 3000, "$", "groups", "more", "w@0+1", "a\nb"):
                self.register_parameter(name, nn.Parameter(torch.randn(3)))
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.register_buffer("kept_nowhere", torch.ones(2), persistent=False)

    def made() -> dict[str, Any]:
        model = Odd()
        return {"model": model, "optimizer": optim.AdamW(model.parameters())}

    first, *others = (made() for _ in range(4))
    for p in first["model"].parameters():
        p.grad = torch.ones_like(p)
    first["optimizer"].step()
    moved(tmp_path / "run", first, others[0])
    export_torch(tmp_path / "run", tmp_path / "all.pt")
    load_torch(tmp_path / "all.pt", others[1])
    with pytest.warns(UserWarning, match="single process"):
        export_dcp(tmp_path / "run", tmp_path / "dcp")
    import_dcp(tmp_path / "dcp", others[2])
    for other in others:
        for (name, p), q in zip(first["model"].named_parameters(), other["model"].parameters(), strict=True):
            assert torch.equal(p, q), name
            for key, value in first["optimizer"].state[p].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["optimizer"].state[q][key])), name


def lbfgs(width: int = 2) -> tuple[nn.Module, torch.optim.LBFGS]:
    torch.manual_seed(0)
    model = nn.Linear(3, width, bias=False)
    return model, torch.optim.LBFGS(model.parameters(), max_iter=3)


def minimized(model: nn.Module, optimizer: torch.optim.LBFGS) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(((p - 1).square() + p.pow(4)).sum() for p in model.parameters())
        loss.backward()  # type: ignore[union-attr]
        return loss  # type: ignore[return-value]

    optimizer.step(closure)  # type: ignore[arg-type]


def test_states_of_torch_that_are_flat_and_those_that_are_not(tmp_path: Path) -> None:
    """L-BFGS keeps vectors of as many elements as its only parameter has."""
    (model, optimizer), (other, others) = lbfgs(), lbfgs()
    minimized(model, optimizer)
    moved(tmp_path / "flat", {"model": model, "optimizer": optimizer}, {"model": other, "optimizer": others})
    minimized(model, optimizer)
    minimized(other, others)
    assert torch.equal(model.weight, other.weight)  # type: ignore[arg-type]
    shapes = []
    for shape in ((2, 3), (3, 2), (6,)):
        p = nn.Parameter(torch.ones(shape))
        shapes.append(torch.optim.SGD([("p", p)], lr=0.1, momentum=0.9))
    p.grad = torch.ones(6)
    shapes[2].step()
    with pytest.raises(Mismatch, match=r"p: its state 'momentum_buffer' has shape \(6,\) in the checkpoint"):
        moved(tmp_path / "shaped", {"optimizer": shapes[2]}, {"optimizer": shapes[0]})


@pytest.mark.parametrize("second", [0.01, 0.02])
def test_groups_whose_rates_are_tensors_may_be_joined_if_they_are_the_same(second: float, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    apart = torch.optim.Adam([{"params": [model.weight], "lr": torch.tensor(0.01)},
                              {"params": [model.bias], "lr": torch.tensor(second)}])
    joined = torch.optim.Adam(model.parameters(), lr=torch.tensor(1.0))
    if second == 0.01:
        moved(tmp_path, {"model": model, "optimizer": apart}, {"model": model, "optimizer": joined})
        assert joined.param_groups[0]["lr"] == torch.tensor(0.01)
    else:
        with pytest.raises(Mismatch, match="whose options differ"):
            moved(tmp_path, {"model": model, "optimizer": apart}, {"model": model, "optimizer": joined})


@pytest.mark.parametrize("options", [dict(state_dtype="bf16", state_rounding="stochastic"),
                                     dict(ema_decay=0.9, ema_dtype="fp16")])
def test_what_was_saved_before_its_first_step_begins_anew_in_one_that_has_stepped(options: Any, tmp_path: Path) -> None:
    """The count of random draws is there from the first step on."""
    def stepped(model: nn.Module, optimizer: Any, steps: int) -> None:
        for step in range(steps):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    (one, first), (other, second) = ((model, optim.AdamW(model.parameters(), **options))
                                     for model in (nn.Linear(40, 40), nn.Linear(40, 40)))
    stepped(other, second, 2)
    moved(tmp_path, {"model": one, "optimizer": first}, {"model": other, "optimizer": second})
    stepped(one, first, 3)
    stepped(other, second, 3)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in first.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second.state[q][key])), key


# --- Values -----------------------------------------------------------------------------------------------------------

def test_tensors_under_keys_that_look_alike(tmp_path: Path) -> None:
    value = {1: torch.ones(1), "1": torch.zeros(1), "a": {"b": torch.ones(2)}, "a/b": torch.zeros(2),
             "a%2Fb": torch.ones(3)}
    held = {"texts": {key: one for key, one in value.items() if key != 1}, "mixed": value}
    found = moved(tmp_path, held, {}).values
    assert str(found) == str(held)


@pytest.mark.parametrize("array", [
    np.arange(3)[::-1], np.arange(6.0).reshape(2, 3).T, np.arange(3, dtype=">f4"), np.broadcast_to(np.float32(2), (3,)),
    np.array(5)])
@pytest.mark.filterwarnings("error")
def test_arrays_of_any_layout(array: np.ndarray, tmp_path: Path) -> None:
    found = moved(tmp_path, {"array": array}, {}).values["array"]
    assert np.array_equal(found, array)
    assert found.shape == array.shape
    assert found.dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize("array", [np.array([object()]), np.array(["a"]), np.ma.array([1, 2], mask=[True, False])])
def test_arrays_that_cannot_be_kept_are_named(array: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"config/data is a {type(array).__name__} of .* cannot hold"):
        moved(tmp_path, {"config": {"data": array}}, {})


def test_whole_numbers_of_any_length(tmp_path: Path) -> None:
    numbers = [10**5000, -(10**5000), 2**64, -(2**4096)]
    assert (moved(tmp_path, {"numbers": numbers}, {}).values["numbers"] == numbers) is True


def test_a_damaged_value_is_seen_before_anything_is_changed(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            with torch.no_grad():
                model.weight.fill_(step)
            path = checkpoints.save(step, {"model": model, "value": torch.full((9,), 7.0 * step)}).wait()
        assert path is not None
        (file,) = path.glob("*.safetensors")
        file.write_bytes(file.read_bytes().replace(np.float32(14).tobytes() * 9, bytes(36)))
        with pytest.warns(UserWarning, match="passed over"):
            loaded = checkpoints.load({"model": model})
    assert loaded is not None
    assert loaded.step == 1
    assert bool((model.weight == 1).all())


# --- Calls ------------------------------------------------------------------------------------------------------------

def test_steps_and_metrics_are_those_of_the_call(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {"a": np.float32(1.5), "b": torch.tensor(2), "c": float("nan")}
    with Checkpointer(tmp_path, keep=np.int64(2)) as checkpoints:  # type: ignore[arg-type]
        saving = checkpoints.save(np.int64(3), {"x": torch.zeros(1 << 22)}, metrics)  # type: ignore[arg-type]
        metrics["a"] = 9
        saving.wait()
    (found,) = complete(tmp_path)
    assert str((found.step, found.metrics)) == "(3, {'a': 1.5, 'b': 2.0, 'c': nan})"


@pytest.mark.parametrize(("step", "state", "metrics", "words"), [
    (-1, {}, None, "non-negative integer, not -1"), (True, {}, None, "not True"), (1.0, {}, None, "not 1.0"),
    (1, {}, {"loss": "low"}, "'loss' is 'low'"), (1, {}, {"loss": torch.ones(2)}, "'loss' is tensor"),
    (1, nn.Linear(1, 1), None, "a state is a dict .*not a Linear")])
def test_a_wrong_call_is_refused_by_the_call(step: Any, state: Any, metrics: Any, words: str, tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises((TypeError, ValueError), match=words):
            checkpoints.save(step, state, metrics)
        checkpoints.save(1, {}).wait()  # nothing of it is left
    assert os.listdir(tmp_path / "step-000000000001")
    assert sorted(os.listdir(tmp_path)) == ["lock", "step-000000000001"]


@pytest.mark.parametrize("keep", ["3", 2.0, True])
def test_what_says_not_how_many_to_keep(keep: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"keep={re.escape(repr(keep))} must be"):
        Checkpointer(tmp_path, keep=keep)


def test_a_relative_directory_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with Checkpointer("run", keep=Keep(last=1)) as checkpoints:
        checkpoints.save(1, {"x": 1}).wait()
        monkeypatch.chdir("other")
        checkpoints.save(2, {"x": 2}).wait()
        loaded = checkpoints.load({"x": 0})
    assert loaded is not None
    assert loaded.values == {"x": 2}
    assert os.listdir(tmp_path / "other") == []


def test_which(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": 1}).wait()
        for which in (np.int64(1), "step-000000000001", tmp_path / "step-000000000001", "newest"):
            loaded = checkpoints.load({"x": 0}, which)  # type: ignore[arg-type]
            assert loaded is not None
            assert loaded.step == 1
        for which in (True, None, 1.0):
            with pytest.raises(TypeError, match=f"which={which!r}: give"):
                checkpoints.load({"x": 0}, which)  # type: ignore[arg-type]
        with pytest.raises(NotACheckpoint, match="'best' is neither 'newest' nor a path"):
            checkpoints.load({"x": 0}, "best")


def test_what_is_removed_while_it_is_loaded_gives_way_to_what_was_saved_since(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who evaluates loads beside who trains, and keeps one only."""
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": 1}).wait()
        told = loading.complete

        def then_another(directory: Path) -> Any:
            found = told(directory)
            if found[0].step == 1:
                checkpoints.save(2, {"x": 2}).wait()
            return found

        monkeypatch.setattr(loading, "complete", then_another)
        with pytest.warns(UserWarning, match="step-000000000001.* passed over"):
            loaded = load(tmp_path, {"x": 0})
    assert loaded is not None
    assert loaded.step == 2


def test_a_fork_does_not_write_into_what_its_parent_has_locked(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        child = os.fork()
        if not child:
            try:
                checkpoints.save(1, {"x": 1})
            except RuntimeError as error:
                os._exit(17 if "is a fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
