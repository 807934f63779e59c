"""Saves beside the training: what they hold, what they cost, what becomes of their errors, and damage that is found."""

from __future__ import annotations

import copy
import gc
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from checkpointed import Run, assert_same
from torch import nn

from fasttrain.checkpoint import (
    Checkpointer,
    CheckpointError,
    Locked,
    NotACheckpoint,
    Reader,
    Rng,
    checkpointer,
    complete,
)
from fasttrain.checkpoint.parts import GRAIN, Among, Part, mine, parts_of
from fasttrain.optim import AdamW


def files(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in path.iterdir() if one.name != "manifest.json"}


def flip(path: Path, tensor: str, byte: int = 0) -> Path:
    """Flip one bit of a tensor's data; the file."""
    with Reader(path) as reader:
        part = reader.tensors[tensor].parts[0]
    file = path / part.file
    data = bytearray(file.read_bytes())
    data[part.offset + byte] ^= 4
    file.write_bytes(data)
    return file


class Held:
    """Lets the writing thread wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.go = threading.Event()
        write = checkpointer.write_rank
        monkeypatch.setattr(checkpointer, "write_rank", lambda *a, **k: (self.go.wait(), write(*a, **k)))


# --- What is saved ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stored", ["fp32", "8-byte"])
def test_what_changes_after_the_call_does_not_leak_in(stored: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    run = Run(None, None, stored)
    run.step(0)
    config = {"list": [1]}
    with Checkpointer(tmp_path) as checkpoints:
        saving = checkpoints.save(1, run.state(config=config))
        wanted = run.whole()
        wanted = copy.deepcopy(wanted)
        assert not saving.done
        run.step(1)
        config["list"].append(2)
        torch.rand(1)
        with torch.no_grad():
            for p in run.bare.parameters():
                p.fill_(7.0)
        held.go.set()
        saving.wait()
        again = Run(None, None, stored, seed=3)
        loaded = checkpoints.load(again.state(config=None))
    assert loaded.values == {"config": {"list": [1]}}
    assert_same(again.whole(), wanted)


@pytest.mark.parametrize("stored", ["split bf16", "soap", "fp32"])
def test_save_load_save_is_byte_identical(stored: str, tmp_path: Path) -> None:
    run = Run(None, None, stored)
    for number in range(2):
        run.step(number)
    made = []
    for place, staging in (("first", "memory"), ("again", "memory"), ("at once", "none")):
        with Checkpointer(tmp_path / place, staging=staging) as checkpoints:
            made.append(files(checkpoints.save(2, run.state()).wait()))
        run = Run(None, None, stored, seed=5)
        with Checkpointer(tmp_path / place) as checkpoints:
            checkpoints.load(run.state())
    assert made[0] == made[1] == made[2]


def test_the_memory_is_kept_and_nothing_is_allocated_for_tensors(tmp_path: Path) -> None:
    model = nn.ModuleList(nn.Linear(256, 256) for _ in range(20))
    records: list[dict[str, Any]] = []
    with Checkpointer(tmp_path, record=records.append) as checkpoints:
        for step in (1, 2, 3):
            memory = checkpoints._staging._memory.data_ptr()
            gc.collect()
            tracemalloc.start()
            with torch.profiler.profile(profile_memory=True) as profile:
                saving = checkpoints.save(step, {"model": model})
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            saving.wait()
            allocated = sum(max(0, event.cpu_memory_usage) for event in profile.events())
        assert memory == checkpoints._staging._memory.data_ptr()
    nbytes = sum(p.nbytes for p in model.parameters())
    begun = [one for one in records if one["event"] == "checkpoint"]
    assert begun[0]["staging_bytes"] >= nbytes == begun[0]["bytes"]
    assert "staging_bytes" not in begun[1]
    assert allocated == 0
    assert peak < nbytes // 4
    assert [one["step"] for one in records if one["event"] == "checkpoint written"] == [1, 2, 3]


def test_what_ranks_share_is_divided_among_them() -> None:
    """By bytes, without gaps or overlap, whatever the sizes; everybody computes the same."""
    numbers = torch.Generator().manual_seed(0)
    sizes = [int(size) for size in torch.randint(0, 60000, (40,), generator=numbers)] + [1_000_003, 0, 5, 300_000]
    for count in (1, 2, 3, 7):
        taken: dict[str, list[tuple[int, int]]] = {}
        totals = []
        for index in range(count):
            parts = [part for place, size in enumerate(sizes)
                     for part in parts_of(f"t/{place}", torch.empty(size, dtype=torch.bfloat16), Among(index, count))]
            share = mine(parts)
            totals.append(sum(part.nbytes for part in share))
            for part in share:
                taken.setdefault(part.name, []).append(part.region.span or (0, part.region.elements))
        for place, size in enumerate(sizes):
            at = 0
            for first, length in sorted(taken[f"t/{place}"]):
                assert first == at
                at += length
            assert at == size
        assert max(totals) - min(totals) <= 2 * (60000 * 2 + GRAIN)
    assert mine([Part("a", torch.ones(1), parts[0].region, silent=True)]) == []


# --- Busy, and broken -------------------------------------------------------------------------------------------------

def test_a_save_while_one_runs_waits_or_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch)
    state = {"model": nn.Linear(2, 2)}
    with Checkpointer(tmp_path / "skip", when_busy="skip") as checkpoints:
        first = checkpoints.save(1, state)
        second = checkpoints.save(2, state)
        assert (second.skipped, second.wait(), checkpoints.skipped, first.done) == (True, None, 1, False)
        held.go.set()
        first.wait()
        assert not checkpoints.save(3, state).skipped
    assert [found.step for found in complete(tmp_path / "skip")] == [3, 1]
    held.go.clear()
    with Checkpointer(tmp_path / "wait") as checkpoints:
        first = checkpoints.save(1, state)
        threading.Timer(0.2, held.go.set).start()
        checkpoints.save(2, state)
        assert first.done
    assert len(list((tmp_path / "wait").glob("step-*"))) == 2


class Death(BaseException):
    """What ends a thread without being an error."""


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Death("of the thread")])
@pytest.mark.parametrize("how", ["save", "check", "close", "wait", "with"])
def test_an_error_of_the_writer_is_raised_where_somebody_looks(how: str, error: BaseException, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"model": nn.Linear(2, 2)}
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, state).wait()

    def fails(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(checkpointer, "write_rank", fails)
        saving = checkpoints.save(2, state)
        while not saving.done:
            time.sleep(0.001)
    with pytest.raises((OSError, CheckpointError)):
        {"save": lambda: checkpoints.save(3, state), "check": checkpoints.check, "close": checkpoints.close,
         "wait": saving.wait, "with": lambda: checkpoints.__exit__(None, None, None)}[how]()
    if how in ("save", "check", "wait"):  # told once; it goes on
        checkpoints.save(4, state).wait()
        checkpoints.close()
    loaded = Checkpointer(tmp_path).load(state)
    assert loaded.step == (4 if how in ("save", "check", "wait") else 1)
    assert not list(tmp_path.glob(".part-2*/*.json"))


def test_an_error_does_not_hide_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk")

    monkeypatch.setattr(checkpointer, "write_rank", fails)
    checkpoints = Checkpointer(tmp_path)

    def loop() -> None:
        with checkpoints:
            checkpoints.save(1, {"a": 1})
            raise KeyError("loop")

    with pytest.raises(KeyError) as raised:
        loop()
    assert raised.value.__notes__ == ["and the last save failed: OSError: disk"]
    with pytest.raises(RuntimeError, match="closed"):
        checkpoints.save(2, {"a": 1})


def second(wire: Any, folder: str) -> list[str]:
    said = []
    try:
        Checkpointer(folder, wire=wire)
    except CheckpointError as error:
        said.append(str(error))
    try:
        Checkpointer(f"{folder}/other", wire=wire, every=wire.rank + 1)
    except ValueError as error:
        said.append(str(error))
    return said


def test_ranks_are_refused_together(tmp_path: Path) -> None:
    with Checkpointer(tmp_path), pytest.raises(Locked, match="writes its checkpoints here"):
        Checkpointer(tmp_path)
    with Checkpointer(tmp_path):
        told = ranks.run(second, 2, str(tmp_path))
    assert told[0] == told[1]
    assert "writes its checkpoints here" in told[0][0]
    assert told[0][1] == "the ranks give different checkpointers: every is 1 and 2"


@pytest.mark.parametrize("options, words", [
    (dict(staging="disk"), "staging='disk' is none of 'memory', 'none'"), (dict(every=0), "every=0 must be"),
    (dict(when_busy="no"), "when_busy='no'"), (dict(keep=0), "last must be at least 1")])
def test_options(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        Checkpointer(tmp_path, **options)


# --- Damage -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tensor", ["model/0.weight", "optimizer/0.bias/exp_avg_sq", "optimizer/0.weight/step",
                                    "rng/rank0/torch", "rng/rank0/python/words"])
def test_a_flipped_bit_is_found_named_and_passed_over(tensor: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": Rng()}
    weights = []
    with Checkpointer(tmp_path) as checkpoints:
        for step in (1, 2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            checkpoints.save(step, state).wait()
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
        newest = tmp_path / "step-000000000002"
        file = flip(newest, tensor)
        with pytest.raises(CheckpointError, match=tensor):
            checkpoints.load(state, which=newest)
        assert_same(model.state_dict(), weights[1])
        with pytest.warns(UserWarning, match="cannot be used, and is passed over for the one before it"):
            loaded = checkpoints.load(state)
        assert (loaded.step, [path for path, _ in loaded.skipped]) == (1, [newest])
        assert tensor in loaded.skipped[0][1]
        assert str(file) in loaded.skipped[0][1]
        assert_same(model.state_dict(), weights[0])
        flip(tmp_path / "step-000000000001", tensor)
        with (pytest.warns(UserWarning, match="is passed over"),
              pytest.raises(CheckpointError, match="none of the 2 checkpoints")):
            checkpoints.load(state)
        checkpoints.save(3, state).wait()  # the newest again
        assert checkpoints.load(state).step == 3
        with pytest.raises(NotACheckpoint, match=r"no usable checkpoint of step 9; it has those of steps \[1, 2, 3\]"):
            checkpoints.load(state, which=9)
        assert checkpoints.load(state, which=3).step == 3


def loads_together(wire: Any, folder: str) -> tuple[int, list[str], float]:
    run = Run(wire, 1, "fp32", seed=2)
    with Checkpointer(folder, wire=wire) as checkpoints:
        loaded = checkpoints.load(run.state())
    assert loaded is not None
    return loaded.step, [reason for _, reason in loaded.skipped], float(run.bare.seen[0])


def saves_twice(wire: Any, folder: str) -> None:
    run = Run(wire, 1, "fp32")
    with Checkpointer(folder, wire=wire) as checkpoints:
        for step in (1, 2):
            run.step(step)
            checkpoints.save(step, run.state())


def test_damage_that_one_rank_meets_turns_all_to_the_checkpoint_before(tmp_path: Path) -> None:
    ranks.run(saves_twice, 2, str(tmp_path))
    flip(tmp_path / "step-000000000002", "rng/rank1/torch")
    got = ranks.run(loads_together, 2, str(tmp_path))
    assert got[0] == got[1]
    assert (got[0][0], got[0][2]) == (1, 1.0)
    assert "rng/rank1/torch" in got[0][1][0]


def one_fails(wire: Any, folder: str) -> str:
    state = {"model": nn.Linear(4, 4)}
    if wire.rank == 1:
        checkpointer.write_rank = lambda *_, **__: (_ for _ in ()).throw(OSError("no disk here"))
    checkpoints = Checkpointer(folder, wire=wire, deadline_s=0.5)
    saving = checkpoints.save(1, state)
    try:
        saving.wait()
    except (CheckpointError, OSError) as error:
        return str(error)
    return "saved"


def test_a_rank_that_cannot_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    first, other = ranks.run(one_fails, 2, str(tmp_path))
    assert "rank 1 of 2" in first
    assert other == "no disk here"
    assert not list(tmp_path.glob("step-*"))
    with pytest.warns(UserWarning, match="removed what an earlier run had left unfinished"):
        again = Checkpointer(tmp_path)
    assert [path.name[:8] for path in again.cleaned] == [".part-1-"]


def skips(wire: Any, folder: str) -> tuple[int, list[str]]:
    held = threading.Event()
    if wire.rank == 1:  # one rank is slow, and all skip
        write = checkpointer.write_rank
        checkpointer.write_rank = lambda *a, **k: (held.wait(), write(*a, **k))
    state = {"model": nn.Linear(4, 4)}
    with Checkpointer(folder, wire=wire, when_busy="skip") as checkpoints:
        first = checkpoints.save(1, state)
        checkpoints.save(2, state)
        held.set()
        first.wait()
        wire.barrier()
        checkpoints.save(3, state)
    return checkpoints.skipped, sorted(path.name for path in Path(folder).glob("step-*")) if wire.rank == 0 else []


def test_ranks_skip_together(tmp_path: Path) -> None:
    got = ranks.run(skips, 2, str(tmp_path))
    assert [skipped for skipped, _ in got] == [1, 1]
    assert got[0][1] == ["step-000000000001", "step-000000000003"]
