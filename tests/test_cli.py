"""The command line: bad input is one clear line, exit code 2, and nothing written."""

import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import fasttrain
from fasttrain import cli
from fasttrain.train import report
from fasttrain.train.place import Place


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
    ("", "Expected one of {train, tokenize, compare, report, schedule, plan, verify, inspect, demo, doctor}"),
    ("trian", "trian"),
    ("train --stpes 4", "--stpes, 4"),
    ("train --step 4", "perhaps you meant --steps"),
    ("train --steps many", "--steps: invalid literal for int() with base 10: 'many'"),
    ("train --steps 0", "--steps 0: must be at least 1"),
    ("train --lr nan", "--lr nan: must be finite"),
    ("train --lr -1", "--lr -1.0: must be finite and not negative"),
    ("train --seed -1", "--seed -1"),
    ("train --max-restarts -1", "--max-restarts -1: must be finite and not negative"),
    ("train --held-out 1", "--held-out 1.0"),
    ("train --sequence 1", "--sequence 1"),
    ("train --device tpu", "invalid choice 'tpu'"),
    ("train --width 100 --heads 3", "use a width that is a multiple of 6"),
    ("train --processes 3 --batch 8", "use a batch that is a multiple of 3"),
    ("train --processes 4096 --batch 4096", "use at most"),
    ("train --threads 4096", "--threads 4096 on"),
    ("train --zero 3 --wire ordered", "--zero 3 with --wire ordered"),
    ("train --zero 3 --wire int8", "--zero with --wire int8"),
    ("train --zero 4", "invalid choice '4' for argument '--zero'"),
    ("train --tensor 0", "--tensor 0: must be at least 1"),
    ("train --tensor 3", "--tensor 3 with --processes 2: together they take 3; use a multiple"),
    ("train --tensor 2 --pipeline 2 --processes 6", "--tensor 2 --pipeline 2 with --processes 6: together they take 4"),
    ("train --tensor 2 --heads 1", "--tensor 2 with 1 heads: each process needs whole heads"),
    ("train --tensor 2 --heads 4 --kv-heads 1", "--tensor 2 with 1 heads of keys"),
    ("train --kv-heads 3", "--kv-heads 3 with --heads 4"),
    ("train --tensor 3 --heads 3 --width 96 --processes 3 --gated", "256 features within a feed-forward part do not"),
    ("train --tensor 3 --heads 3 --width 96 --processes 3 --experts 2", "or for --width a multiple of 72"),
    ("train --zero 3 --copies 2", "--zero 3 with --copies 2 and --processes 2: none are left to divide the parameters"),
    ("train --zero 3 --context 2", "use a larger multiple of 2 processes, or --zero 2"),
    ("train --pipeline 2 --accumulate 2 --stages 2 --pipeline-schedule zbv --recompute selective",
     "use --recompute full, or interleaved"),
    ("train --sequence-parallel", "--sequence-parallel without --tensor"),
    ("train --tensor 2 --sequence-parallel --sequence 127", "--sequence 127 on 2 processes of --tensor"),
    ("train --context 2 --sequence 126", "--context 2 with --sequence 126"),
    ("train --expert 2", "--expert 2 with --experts 0"),
    ("train --experts 2 --top-k 3", "--top-k 3 with --experts 2"),
    ("train --experts 4 --gated", "--gated with --experts"),
    ("train --copies 2", "--copies 2 with --zero 0"),
    ("train --stages 2", "--stages 2 without --pipeline"),
    ("train --pipeline 2 --layers 1 --stages 2 --pipeline-schedule interleaved", "4 stages, and 3 parts"),
    ("train --pipeline 2", "--accumulate 1 with --pipeline 2: it is the number of micro-batches"),
    ("train --pipeline 2 --accumulate 2 --pipeline-schedule zbv", "zbv with --stages 1: use --stages 2"),
    ("train --pipeline 2 --accumulate 2 --stages 2", "--pipeline-schedule 1f1b with --stages 2: use --stages 1"),
    ("train --pipeline 2 --accumulate 3", "--batch 16 on 1 processes that read different sequences"),
    ("train --tensor 2 --optimizer torch.AdamW", "--optimizer torch.AdamW with --tensor 2"),
    ("train --optimizer Nonesuch", "--optimizer Nonesuch: unknown"),
    ("train --optimizer torch.ASGD", "give one with --lr"),
    ("train --text nowhere", "nowhere: No such file"),
    ("train --text empty", "no text in empty"),
    ("train --text words --sequence 100000", "--sequence 100000 is too long for words"),
    ("train --text words --out words", "--out words is not empty"),
    ("train --text words --out file", "--out file: cannot be written"),
    ("train --text words --out file/below", "--out file/below: cannot be written: Not a directory"),
    ("train --steps 20 --warmup 50", "--steps 20 is shorter than --warmup 50"),
    ("train --schedule cosine(10) --warmup 3", "say the warmup in the schedule, as warmup(3) + ..."),
    ("train --schedule cosinus(10)", "there is no schedule cosinus; there are constant"),
    ("train --schedule warmup(50)+cosine(9) --steps 20", "a run of 20 steps ends in the warmup"),
    ("train --spikes 2 --save-every 0", "there would be no checkpoint to go back to"),
    ("train --precision fp16 --optimizer torch.AdamW", "which torch's has not; use AdamW"),
    ("train --ema 1.0", "--ema 1.0: a decay lies between 0 and 1"),
    ("train --ema 0.9 --optimizer torch.AdamW", "torch's keeps no average; use AdamW"),
    ("train --recompute most", "--recompute most: it is full, selective, or every how many blocks"),
    ("train --profile --steps 5", "--profile with --steps 5: it records steps 11 to 13"),
    ("train --config nowhere.toml", "--config nowhere.toml: No such file"),
    ("report nowhere", "nowhere is not a run"),
    ("report", "no run: name the directories"),
    ("schedule cosinus(10)", "there is no schedule cosinus; there are constant, warmup"),
    ("schedule __import__('os')", "there is no schedule __import__"),
    ("schedule 0.5*cosine(10) --steps 0", "--steps 0: must be at least 1"),
    ("schedule cosine(10) --png nowhere/a.png", "--png nowhere/a.png: cannot be written"),
    ("schedule exponential(9.0) --steps 9999", "exponential(9.0) becomes too large"),
    ("tokenize --out new", "no input: name files or directories"),
    ("tokenize words", "--out"),
    ("tokenize words --out words", "words is both input and output"),
    ("tokenize nowhere --out new", "nowhere: No such file"),
    ("tokenize empty --out new", "no text in empty"),
    ("tokenize words --out new --held-out 1", "held_out=1.0"),
    ("tokenize words --out new --tokenizer nowhere.json", "the tokenizer nowhere.json cannot be read"),
    ("tokenize words --out new --tokenizer file", "file is not a file of Hugging Face's tokenizers"),
    ("tokenize words --out new --end-token x", "goes with a tokenizer from a file"),
    ("tokenize words --out new --shard-mb 0", "shard_mb=0"),
    ("tokenize words --out file", "file cannot be written"),
    ("tokenize file --out new", "has one byte"),
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


UNDER_TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                  "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("arguments, environment, message", [
    ("--processes 3", {}, "--processes 3 under torchrun, which has started 4: leave it out"),
    ("--max-restarts 1", {}, "--max-restarts 1 under torchrun: give it to torchrun, before -m"),
    ("", {"TORCHELASTIC_MAX_RESTARTS": "2"}, "torchrun with --max-restarts needs --out DIRECTORY"),
    ("--batch 6", {}, "--processes 4 with --batch 6"),
    ("", {"LOCAL_WORLD_SIZE": "4096", "WORLD_SIZE": "4096"}, "--processes 4096"),
    ("", {"LOCAL_RANK": None}, "WORLD_SIZE and LOCAL_WORLD_SIZE and MASTER_ADDR and MASTER_PORT but not LOCAL_RANK"),
    ("", {"RANK": "first"}, "is no number"),
])
def test_bad_input_under_torchrun(elsewhere, capsys, monkeypatch, arguments, environment, message):
    for name, value in {**UNDER_TORCHRUN, **environment}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cli.main(["train", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err
    assert not (elsewhere / "runs").exists()


def test_torchrun_gives_the_number_of_processes(monkeypatch):
    joined = []
    monkeypatch.setattr("fasttrain.train.rank.join", lambda *given: joined.append(given))
    for name, value in {**UNDER_TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--steps", "7", "--processes", "4", "--out", "run"]) == 0
    (config, here), = joined
    assert (config.steps, config.processes) == (7, 4)
    assert here == Place(rank=1, world=4, local_rank=1, here=2, most_restarts=3)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_line_does_not_depend_on_the_terminal(encoding):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONIOENCODING": encoding}
    ended = subprocess.run([sys.executable, "-m", "fasttrain", "train", "--step", "4"], env=environment,
                           capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == (
        "fasttrain: Unrecognized options: --step, 4; perhaps you meant --steps; see --help\n")


@pytest.mark.parametrize("arguments, words", [
    ("--help", ["train", "tokenize", "compare", "doctor"]),
    ("train --help", ["--optimizer", "--text", "torch.AdamW", "(default: 2)", "--processes"]),
    ("compare --help", ["FIRST", "SECOND"]),
    ("schedule --help", ["SCHEDULE", "--steps", "--png"]),
])
def test_help(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments.split())
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in words:
        assert word in said


def test_a_schedule_is_drawn(elsewhere, capsys):
    assert cli.main(["schedule", "warmup(100) + cosine(1000, floor=0.1)", "--png", "drawn.png"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "warmup(100) + cosine(1000, floor=0.1)"
    assert said[-2].split() == ["0", "1100"]
    assert said[-1] == "step 0: 0.01; step 275: 0.933688; step 550: 0.620396; step 1100: 0.1"
    assert sum(line.count("*") for line in said[1:-2]) == 72
    assert (elsewhere / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert "(required)" not in said
    for name in cli.TrainConfig.__dataclass_fields__:
        assert re.search(f"--{name.replace('_', '-')}[ ,]", said)


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


@pytest.mark.parametrize("nccl, said", [(True, ["gloo", "NCCL (beyond one rank: never run)"]), (False, ["gloo"])])
def test_doctor_says_what_has_never_run(monkeypatch, nccl, said):
    from fasttrain import doctor

    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: nccl)
    assert list(doctor.collectives()) == said


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
