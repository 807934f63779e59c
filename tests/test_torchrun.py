"""`torchrun -m fasttrain train`: ranks that somebody else has started, on one host and on two."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ranks
import test_loop
from test_launch import ROOT, TINY, finish, processes_of, wait_for

from fasttrain.train import report, text
from fasttrain.train.config import TrainConfig


def words(host: Path, line: str = "bottles stand on the wall") -> Path:
    (host / "words").mkdir(parents=True)
    for i in range(20):
        (host / "words" / f"{i}.txt").write_text(f"{i} {line}\n" * 40)
    return host


def start(host: Path, launcher: list[str], *options: str) -> subprocess.Popen[str]:
    """torchrun on a "host", which is a directory of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, "--local-addr=127.0.0.1", "-m", "fasttrain", "train",
         "--text", "words", "--out", "run", *TINY, *options],
        cwd=host, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def two_hosts(*hosts: Path, options: tuple[tuple[str, ...], ...] = ((), ()), more: tuple[str, ...] = ()) -> list[Any]:
    """(exit code, output, errors) of torchrun on each of two hosts with one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
                "--rdzv-id=job", *more]
    started = [start(host, launcher, *mine) for host, mine in zip(hosts, options, strict=True)]
    try:
        return [finish(one, seconds=150) for one in started]
    finally:
        for one in started:
            one.kill()


def test_two_hosts_train_as_one(tmp_path: Path) -> None:
    """Whichever becomes the first rank writes; the losses are those of --zero 0 without torchrun."""
    hosts = [words(tmp_path / name) for name in ("one", "other")]
    sharded = ("--zero", "3", "--accumulate", "2", "--steps", "6", "--save-every", "0")  # no directory is shared
    ended = two_hosts(*hosts, options=(sharded, sharded))
    assert [code for code, *_ in ended] == [0, 0], ended
    (home,) = [host for host in hosts if (host / "run").exists()]
    assert sorted(p.name for p in (home / "run").iterdir()) == ["config.json", "log.jsonl", "run.png", "summary.json"]
    run = report.read(home / "run")
    assert run.config["processes"] == 2
    summary = json.loads((home / "run" / "summary.json").read_text())
    assert 0 <= summary["wire"]["bytes"] - summary["wire"]["formula"] < 200  # what the ranks settle in each step
    said = "".join(out for _, out, _ in ended)
    assert "2 processes on cpu, AdamW; writing to run" in said
    assert f"by the formula; exposed: {1000 * summary['wire']['exposed_s']:.1f} ms" in said
    config = TrainConfig.from_json({**run.config, "zero": 0})
    read = text.load(home / "words", config.held_out, config.sequence)
    expected = test_loop.losses(ranks.run(trained, 2, config, read)[0])
    assert [record["loss"] for record in run.train] == pytest.approx(expected, rel=1e-5)


def trained(wire: Any, config: TrainConfig, read: text.Text) -> Any:
    return test_loop.run(wire, config, read, config.ngrams, config.rows)[0]


@pytest.mark.slow
def test_hosts_with_other_texts_end_with_the_reason(tmp_path: Path) -> None:
    hosts = [words(tmp_path / "one"), words(tmp_path / "other", "glasses stand on the wall")]
    ended = two_hosts(*hosts)
    for code, _, errors in ended:
        assert code == 1
        assert "BadInput" in errors or "not started alike: the text is " in errors
    assert "not started alike: the text is " in "".join(errors for *_, errors in ended)
    assert not any((host / "run").exists() for host in hosts)


@pytest.mark.slow
def test_two_hosts_start_again(tmp_path: Path) -> None:
    """The process of one is killed: that of the other ends of it, and both go on, from the first step."""
    hosts = [words(tmp_path / name) for name in ("one", "other")]
    options = ("--steps", "300", "--log-every", "50", "--out", str(tmp_path / "run"))

    def kill_one() -> None:
        log = tmp_path / "run" / "log.jsonl"
        wait_for(lambda: log.exists() and '"train"' in log.read_text(), "the first line of the log")
        os.kill(next(pid for pid, rank in processes_of(tmp_path).items() if rank == 1), signal.SIGKILL)

    with ThreadPoolExecutor() as pool:
        killed = pool.submit(kill_one)
        ended = two_hosts(*hosts, options=(options, options), more=("--max-restarts=2",))
        killed.result()
    assert [code for code, *_ in ended] == [0, 0], ended
    said = "".join(out for _, out, _ in ended)
    assert "started again (once by now)" in said
    assert "from the beginning: there is no checkpoint" in said
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_no_rank_outlives_torchrun(tmp_path: Path) -> None:
    host = words(tmp_path / "host")
    options = ("--steps", "1000000", "--out", str(tmp_path / "run"))
    torchrun = start(host, ["--standalone", "--nproc-per-node=2"], *options)
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and '"train"' in log.read_text(), "the first line of the log")
    assert {0, 1} <= set(processes_of(tmp_path).values())
    torchrun.kill()
    errors = finish(torchrun)[2]
    assert "torchrun has ended on its host without ending it" in errors
    wait_for(lambda: not processes_of(tmp_path), "the processes to end", seconds=10)


@pytest.mark.slow
def test_one_host(tmp_path: Path) -> None:
    """The second time the directory is there: the first rank says so, and the other why it ends."""
    host = words(tmp_path / "host")
    launcher = ["--standalone", "--nproc-per-node=2"]
    code, out, _ = finish(start(host, launcher, "--steps", "2"))
    assert code == 0
    assert "step 2/2" in out
    before = (host / "run" / "log.jsonl").read_bytes()
    code, out, errors = finish(start(host, launcher, "--steps", "2"))
    assert (code, out) == (1, "")
    assert "fasttrain: rank 0: --out run is not empty; give a new directory" in errors
    assert "fasttrain: rank 1: rank 0 failed: BadInput: --out run is not empty" in errors
    assert (host / "run" / "log.jsonl").read_bytes() == before


SLURM = ROOT / "examples" / "slurm.sh"
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames two-hosts" ] && echo localhost && echo elsewhere
"""
SRUN = """#!/bin/bash
shift
"$@" & first=$!
"$@"; second=$?
wait $first && exit $second
"""


def test_the_slurm_example_is_bash() -> None:
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0


@pytest.mark.slow
def test_the_slurm_example_runs(tmp_path: Path) -> None:
    """With SLURM's variables, and commands in the place of its own: srun starts torchrun twice."""
    host = words(tmp_path / "host")
    for name, content in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "SLURM_JOB_NODELIST": "two-hosts", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
                   "SLURM_JOB_ID": str(os.getpid())}
    job = subprocess.Popen([SLURM, "--text", "words", "--out", "run", *TINY, "--steps", "2"], cwd=host, env=environment,
                           text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    code, out, errors = finish(job, seconds=180)
    assert code == 0, errors
    assert "2 processes on cpu" in out
    assert "step 2/2" in out
