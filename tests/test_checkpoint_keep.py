"""Which checkpoints stay, and that nothing else does; leftovers; clocks that jump; names that are hard."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpointing import proven, save
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.checkpoint import commit
from fasttrain.checkpoint.files import Found, Keep, Lock, clean, complete, leftovers, newest, prune, publish, write_rank

START = datetime(2026, 1, 1, tzinfo=UTC)


def found(step: int, loss: float | None = None, minutes: int | None = None, sequence: int | None = None) -> Found:
    return Found(Path(f"{step}/{sequence}"), step=step, sequence=step if sequence is None else sequence,
                 metrics={} if loss is None else {"loss": loss},
                 time=(START + timedelta(minutes=step if minutes is None else minutes)).isoformat())


def kept(keep: Keep, *these: Found) -> list[int]:
    return sorted(one.step for one in these if one.path in keep.chosen(these))


def test_each_rule() -> None:
    these = [found(step, loss=abs(step - 7)) for step in range(1, 21)]
    assert kept(Keep(last=2), *these) == [19, 20]
    assert kept(Keep(last=None), *these) == [*range(1, 21)]
    assert kept(Keep(last=1, best=2, metric="loss"), *these) == [7, 8, 20]  # of equals the newer one
    assert kept(Keep(last=1, best=2, metric="loss", mode="max"), *these) == [19, 20]
    assert kept(Keep(last=1, every=6), *these) == [6, 12, 18, 20]
    assert kept(Keep(last=1, every_s=480), *these) == [1, 9, 17, 20]
    assert kept(Keep(last=2, best=1, metric="loss", every=10, every_s=900), *these) == [1, 7, 10, 16, 19, 20]
    assert Keep().chosen([]) == {}


def test_metrics_that_are_missing_or_no_numbers() -> None:
    these = [found(1, loss=5.0), found(2, loss=math.nan), found(3), found(4, loss=9.0), found(5, loss=math.inf)]
    assert kept(Keep(last=1, best=2, metric="loss"), *these) == [1, 4, 5]
    assert kept(Keep(last=1, best=9, metric="other"), *these) == [5]


def test_a_run_that_went_back() -> None:
    """Newest is by the order of publishing; of two with one step only the newer one counts."""
    these = [found(100, sequence=1), found(200, sequence=2), found(300, sequence=3), found(200, sequence=4)]
    chosen = Keep(last=2, every=100).chosen(these)
    assert [*chosen] == [these[3].path, these[2].path, these[0].path]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 3))
def test_one_of_each_age_is_always_kept(minutes: list[int], last: int) -> None:
    """Saved and removed again and again: once anything is an hour old, something that old stays, not twice that."""
    keep, there, now, gap = Keep(last=last, ages_s=(3600.0,)), [], 0, max(minutes)
    for step, more in enumerate(minutes):
        now += more
        there.append(found(step, minutes=now))
        chosen = keep.chosen(there)
        there = [one for one in there if one.path in chosen]
        ages = [(datetime.fromisoformat(there[-1].time) - datetime.fromisoformat(one.time)).total_seconds() / 60
                for one in there]
        assert len(there) <= last + 2
        if now - minutes[0] >= 60:
            assert 60 <= max(ages) <= 2 * 60 + 2 * gap


@pytest.mark.parametrize("wrong,words", [
    (dict(last=0), "at least 1"), (dict(mode="least"), "'min' or 'max'"),
    (dict(best=-1, metric="x"), "not be negative"), (dict(best=1), "needs the metric"),
    (dict(ages_s=(-1.0,)), "not be negative"),
])
def test_rules_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Keep(**wrong)


def test_prune(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], 1):
        save(tmp_path, step, rows=4, metrics={"loss": loss})
    (tmp_path / "mine").mkdir()
    removed = prune(tmp_path, Keep(last=2, best=1, metric="loss"))
    assert [path.name[-1] for path in removed] == ["3", "1"]
    assert [one.step for one in complete(tmp_path)] == [5, 4, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", *(f"step-00000000000{n}" for n in (2, 4, 5))]


def test_what_cannot_be_used_is_not_removed_nor_counted(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, rows=4)
    (tmp_path / "step-000000000005" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "step-000000000004" / "rank-00000-of-00001.safetensors").unlink()
    rank = tmp_path / "step-000000000003" / "rank-00000-of-00001.json"  # of the same size: the newest by sizes of files
    rank.write_bytes(bytes(rank.stat().st_size))
    assert [path.name[-1] for path in prune(tmp_path, Keep(last=1))] == ["1"]
    assert newest(tmp_path).step == 2
    assert prune(tmp_path, Keep(last=1)) == []


def test_a_file_of_somebody_else_in_a_checkpoint_is_not_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, rows=4)
    (tmp_path / "step-000000000001" / "thesis.tex").write_text("...")
    assert prune(tmp_path, Keep(last=1)) == []


def test_leftovers_are_named_and_removed_by_the_locks_holder_only(tmp_path: Path) -> None:
    save(tmp_path, 1, rows=4)
    write_rank(tmp_path / ".part-2-x", 0, 1, [], {})
    (tmp_path / ".trash-step-000000000000" / "deeper").mkdir(parents=True)
    (tmp_path / ".trash-step-000000000000" / "deeper" / "file").write_bytes(b"?")
    (tmp_path / ".trash-link").symlink_to(tmp_path / "step-000000000001")
    (tmp_path / ".other").mkdir()
    names = [".part-2-x", ".trash-link", ".trash-step-000000000000"]
    assert [path.name for path in leftovers(tmp_path)] == names
    lock = Lock(tmp_path)
    lock.release()
    with pytest.raises(ValueError, match="the lock is not held"):
        clean(lock)
    with Lock(tmp_path) as lock:
        assert [path.name for path in clean(lock)] == names
        assert clean(lock) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "lock", "step-000000000001"]
    assert proven(tmp_path / "step-000000000001", 4) == 1


def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither times nor names nor dates of files decide what is newest, and the newest is never removed."""
    class Clock(datetime):
        years = iter((2040, 1971, 2026, 1999))

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(next(cls.years), 1, 1, tzinfo=tz)

    monkeypatch.setattr(commit, "datetime", Clock)
    for step in (40, 30, 20, 10):
        save(tmp_path, step, rows=4)
        assert newest(tmp_path).step == step
        prune(tmp_path, Keep(last=1, every_s=86400, ages_s=(3600,)))
        assert newest(tmp_path).step == step
    assert [one.step for one in complete(tmp_path)] == [10, 20, 30, 40]


def test_renamed_and_copied_directories(tmp_path: Path) -> None:
    """A name says nothing: not of two swapped ones, nor of a step saved twice."""
    for step in (1, 2, 2):
        last = save(tmp_path, step, rows=4, attempt=str(step))
    assert last.name == "step-000000000002-3"
    (tmp_path / "step-000000000001").rename(tmp_path / "aside")
    last.rename(tmp_path / "step-000000000001")
    (tmp_path / "aside").rename(tmp_path / "step-000000000009")
    assert [(one.path.name[11:], one.step, one.sequence) for one in complete(tmp_path)] == [
        ("000001", 2, 3), ("000002", 2, 2), ("000009", 1, 1)]


def test_an_unreadable_one_may_be_newer(tmp_path: Path) -> None:
    """It comes back, say from a server that was away: what was saved meanwhile is newer still."""
    for step in (1, 2):
        save(tmp_path, step, rows=4)
    manifest = tmp_path / "step-000000000002" / "manifest.json"
    manifest.rename(tmp_path / "away")
    save(tmp_path, 3, rows=4)
    (tmp_path / "away").rename(manifest)
    assert [(one.step, one.sequence) for one in complete(tmp_path)] == [(3, 3), (2, 2), (1, 1)]


@pytest.mark.parametrize("name", ["Prüfpunkte ∂ 検査 \U0001f40d", "with\nnewline and 'quotes' \"", "x" * 255, "-rf *",
                                  "surrogate\udcff", "/".join(["deep" * 40] * 20)])
def test_names_that_are_hard(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    with Lock(directory):
        save(directory, 1, rows=4)
        save(directory, 2, rows=4)
        prune(directory, Keep(last=1))
    assert proven(newest(directory).path, 4) == 2


@pytest.mark.parametrize("step", [-1, 1.0, True, "7"])
def test_steps_that_are_none(step: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step must be a non-negative integer"):
        publish(tmp_path, tmp_path / ".part", step, 1)


def test_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    write_rank(tmp_path / ".part", 0, 1, [], {})
    with pytest.raises(TypeError, match=r"metrics are numbers, which retention compares; 'loss' is '0\.1'"):
        publish(tmp_path, tmp_path / ".part", 1, 1, metrics={"loss": "0.1"})
    publish(tmp_path, tmp_path / ".part", 1, 1, metrics={"loss": np.float64(0.1)})
    assert newest(tmp_path).metrics == {"loss": 0.1}
