"""Ranks that torchrun has started settle what they are about to do, and one of them makes the directory."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import ranks

from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.meeting import meet

CONFIG = TrainConfig(sequence=16)


def text_in(folder: Path, words: str = "bottles stand on the wall\n") -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{number} {words}" * 20)
    return folder


def met(wire: Any, folder: Path, own: dict[str, Any], restarts: int = 0) -> Any:
    """What this rank brings home; `own` is what the last rank does in another way."""
    mine = {"text": text_in(folder / f"text{wire.rank}"), "out": folder / f"out{wire.rank}"}
    if wire.rank == wire.size - 1:
        words = own.pop("words", None)
        if words:
            text_in(mine["text"], words)
        mine |= own
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    config = dataclasses.replace(CONFIG, **mine)
    try:
        read, directory = meet(config, wire)
    except BadInput as error:
        return str(error)
    return read.sha256, directory


def test_one_rank_writes_and_all_know_where(tmp_path: Path) -> None:
    """The text lies elsewhere on every host, and --out of the others does not count."""
    (sha, directory), other = ranks.run(met, 2, tmp_path, {})
    assert (sha, directory) == other
    assert directory == tmp_path / "out0"
    header = json.loads((directory / "config.json").read_text())
    assert header["text"]["sha256"] == sha
    assert TrainConfig.from_json(header["config"]).out == directory
    assert not (tmp_path / "out1").exists()


@pytest.mark.parametrize("own, words", [
    ({"steps": 5}, "not started alike: --steps is 5 on rank 1 and 1000 on rank 0"),
    ({"zero": 3}, "--zero is 3 on rank 1 and 0 on rank 0"),
    ({"words": "bottles hang there\n"}, "the text is 1,684 bytes in 4 files, sha256 "),
])
def test_ranks_that_differ_all_say_so_and_nothing_is_written(tmp_path: Path, own: Any, words: str) -> None:
    first, second = ranks.run(met, 2, tmp_path, own)
    assert first == second
    assert words in first
    assert first.endswith("give every host the same command and the same text")
    assert not (tmp_path / "out0").exists()


def again(wire: Any, folder: Path) -> Any:
    """Started again: the same directory, then with another option."""
    assert met(wire, folder, {})[1] == folder / "out0"
    before = (folder / "out0" / "config.json").read_bytes()
    (folder / "out0" / "log.jsonl").touch()
    assert met(wire, folder, {}, restarts=1)[1] == folder / "out0"
    assert (folder / "out0" / "config.json").read_bytes() == before
    refused = [met(wire, folder, {}), met(wire, folder, {"lr": 0.5}, restarts=1)]
    return refused


def test_a_rank_that_is_started_again_goes_on(tmp_path: Path) -> None:
    """Of one rank: what the others hear is in the next test."""
    (refused, other), = ranks.run(again, 1, tmp_path)
    assert refused.endswith("out0 is not empty; give a new directory, remove what is there, or go on with the run in "
                            "it by --resume auto")
    assert "holds a run with --lr None, not 0.5" in other


def meets_and_fails(wire: Any, watcher: Any, folder: Path) -> None:
    with watcher.guard():
        meet(dataclasses.replace(CONFIG, text=text_in(folder / f"text{wire.rank}"), out=folder / "out"), wire)


def test_the_others_hear_why_the_first_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    first, second = ranks.faulty(meets_and_fails, 2, tmp_path)
    why = f"--out {tmp_path / 'out'} is not empty; give a new directory, remove what is there"
    assert f"BadInput: {why}" in first.text
    assert f"PeerFailed: rank 0 failed: BadInput: {why}" in second.text
    assert (first.code, second.code) == (70, 71)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
