"""The commands ``fasttrain verify`` and ``fasttrain inspect``, and the text they print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkpointing import save
from helpers import ROOT

from fasttrain import cli
from fasttrain.checkpoint import inspect, verify


def test_inspect_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 3, 2, metrics={"loss": 0.25})
    text = inspect(path)
    assert text.splitlines()[:4] == [
        str(path), 'step 3, sequence 1, written by 2 ranks, metrics {"loss": 0.25}', "7 tensors, 14,549 bytes",
        "  model/bias                BF16                     7               14"]
    assert "  model/weight              F32                  40x30            4,800  2 parts" in text.splitlines()
    assert "  optimizer/step            I64                 scalar                8" in text.splitlines()
    assert 'values of rank 1: {\n "step": 3,\n "rank": 1,' in text


def test_values_of_ranks_that_are_equal_are_shown_once(tmp_path: Path) -> None:
    from fasttrain.checkpoint import publish, write_rank

    for rank in range(3):
        write_rank(tmp_path / ".part", rank, 3, [], {"long": ["x" * 100] * (50 if rank < 2 else 1)})
    text = inspect(publish(tmp_path, tmp_path / ".part", 1, 3))
    assert text.count("values of") == 2
    assert "values of ranks 0, 1: {" in text
    assert text.count("more characters") == 1


def test_inspect_a_directory(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, rows=4, metrics={"loss": 1 / step})
    (tmp_path / ".part-4-x").mkdir()
    (tmp_path / "step-000000000003" / "manifest.json").write_bytes(b"?")
    (tmp_path / "step-000000000002" / "rank-00000-of-00001.json").unlink()
    head, two, one, three, left = inspect(tmp_path).splitlines()
    assert head == f"{tmp_path}: newest first"
    assert one.startswith("  step-000000000001  sequence 1  20")
    assert one.endswith("1 rank  2,141 bytes  loss 1")
    assert "bytes  loss 0.5  cannot be used: " in two
    assert two.endswith("rank-00000-of-00001.json: not there")
    assert three.startswith("  step-000000000003  cannot be used: ")
    assert left == "  .part-4-x  left by an unfinished save or removal"


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out == inspect(tmp_path) + "\n"
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("step-000000000002\nall bytes are those that were written\n")
    file = tmp_path / "step-000000000002" / "rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cli.main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[2:] == [f"damaged: {verify(tmp_path)[0]}", "1 damaged"]
    assert said[2].startswith(f"damaged: {file}: tensor 'rng/rank0/torch': bytes 0 to 50 of 50 are not those that ")
    (file.parent / "manifest.json").write_bytes(b"")
    assert cli.main(["inspect", str(file.parent)]) == 1
    assert "manifest.json: its first line is not a checksum (0 bytes are there)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_there_is_nothing(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"fasttrain: {tmp_path}: holds no checkpoint\n"
    assert cli.main([command, str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"fasttrain: {tmp_path}/nowhere: no directory\n"


def test_the_commands_import_no_torch(tmp_path: Path) -> None:
    save(tmp_path, 1)
    code = ("import sys; from fasttrain import cli; print(cli.main(['verify', sys.argv[1]]), cli.main(['inspect', "
            "sys.argv[1]]), 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 0 False", done.stderr
