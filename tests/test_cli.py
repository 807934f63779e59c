"""The command line: bad input is one clear line, exit code 2, and nothing written."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fasttrain
from fasttrain import cli
from fasttrain.train import report


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    for i in range(20):
        (tmp_path / "words" / f"{i}.txt").write_text(f"text number {i} " * 200)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("arguments, message", [
    ("", "Expected one of {train, compare, verify, inspect, doctor}"),
    ("trian", "trian"),
    ("train --stpes 4", "--stpes, 4"),
    ("train --step 4", "perhaps you meant --steps"),
    ("train --steps many", "--steps: invalid literal for int() with base 10: 'many'"),
    ("train --steps 0", "--steps 0: must be at least 1"),
    ("train --lr nan", "--lr nan: must be finite"),
    ("train --lr -1", "--lr -1.0: must be finite and not negative"),
    ("train --seed -1", "--seed -1"),
    ("train --held-out 1", "--held-out 1.0"),
    ("train --sequence 1", "--sequence 1"),
    ("train --device tpu", "invalid choice 'tpu'"),
    ("train --width 100 --heads 3", "use a width that is a multiple of 6"),
    ("train --processes 3 --batch 8", "use a batch that is a multiple of 3"),
    ("train --processes 4096 --batch 4096", "use at most"),
    ("train --threads 4096", "--threads 4096 on"),
    ("train --optimizer Nonesuch", "--optimizer Nonesuch: unknown"),
    ("train --optimizer torch.ASGD", "give one with --lr"),
    ("train --text nowhere", "nowhere: No such file"),
    ("train --text empty", "no text in empty"),
    ("train --text words --sequence 100000", "--sequence 100000 is too long for words"),
    ("train --text words --out words", "--out words is not empty"),
    ("train --text words --out file", "--out file: cannot be written"),
    ("train --text words --out file/below", "--out file/below: cannot be written: Not a directory"),
    ("compare nowhere words", "nowhere is not a run"),
    ("compare empty", "SECOND"),
])
def test_bad_input(elsewhere, capsys, arguments, message):
    before = sorted(elsewhere.rglob("*"))
    assert cli.main(arguments.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fasttrain: ")
    assert said.err.count("\n") == 1
    assert message in said.err
    assert sorted(elsewhere.rglob("*")) == before, "bad input must leave nothing behind"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_line_does_not_depend_on_the_terminal(encoding):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-m", "fasttrain", "train", "--step", "4"], env=environment,
                           capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == (
        "fasttrain: Unrecognized options: --step, 4; perhaps you meant --steps; see --help\n")


@pytest.mark.parametrize("arguments, words", [
    ("--help", ["train", "compare", "doctor"]),
    ("train --help", ["--optimizer", "--text", "torch.AdamW", "(default: 2)", "--processes"]),
    ("compare --help", ["FIRST", "SECOND"]),
])
def test_help(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments.split())
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in words:
        assert word in said


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert "(required)" not in said
    for name in cli.TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in said


def test_the_command_starts_without_torch():
    code = "import sys, fasttrain.cli as c; c.parse(['train']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_doctor_is_called(monkeypatch):
    fake = types.ModuleType("fasttrain.doctor")
    fake.main = lambda: 7
    monkeypatch.setitem(sys.modules, "fasttrain.doctor", fake)
    monkeypatch.setattr(fasttrain, "doctor", fake, raising=False)
    assert cli.main(["doctor"]) == 7


def test_sigterm_ends_like_control_c_with_its_own_code(monkeypatch, capsys):
    def launch(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal did not interrupt")

    monkeypatch.setattr("fasttrain.train.launch.launch", launch)
    assert cli.main(["train", "--text", "words"]) == 143
    assert capsys.readouterr().err == "fasttrain: interrupted\n"


def test_runs_are_numbered(elsewhere):
    made = [report.make_directory(None, name) for name in ("AdamW", "AdamW", "torch.AdamW")]
    assert [str(m) for m in made] == ["runs/AdamW-1", "runs/AdamW-2", "runs/torch.AdamW-1"]


def test_config_survives_json():
    config = cli.TrainConfig(text=Path("a"), lr=1e-3, optimizer="SGD")
    assert cli.TrainConfig.from_json(json.loads(json.dumps(config.as_json()))) == config
    assert cli.TrainConfig.from_json(json.loads(json.dumps(cli.TrainConfig().as_json()))) == cli.TrainConfig()
