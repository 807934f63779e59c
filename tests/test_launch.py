"""The main job end to end: the true command, torchrun and two processes. How it ends, well or badly."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from fasttrain.checkpoint.find import complete
from fasttrain.train import launch

ROOT = Path(__file__).parents[1]
TINY = ["--sequence", "32", "--layers", "1", "--width", "16", "--heads", "2", "--batch", "4", "--held-out", "0.2",
        "--warmup", "2", "--log-every", "2", "--validate-every", "4"]


@pytest.fixture
def place(tmp_path):
    for i in range(20):
        path = tmp_path / "words" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{i} bottles stand on the wall\n" * 40)
    return tmp_path


def start(place, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "fasttrain", "train", "--text", "words", "--out", "run", *TINY, *options],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell starts its background jobs with Ctrl-C ignored, and children inherit that: these tests send it.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


def finish(command, seconds=60):
    out, err = command.communicate(timeout=seconds)
    return command.returncode, out, err


def processes_of(place):
    """{pid: rank} of the living processes of the run in `place`; torchrun itself has the rank None."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                environ = (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue  # it ended while we looked
            if state != "Z" and str(place / "run").encode() in command:
                found[int(folder.name)] = next((int(e[5:]) for e in environ if e.startswith(b"RANK=")), None)
    return found


def wait_for(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value


def under_way(place):
    log = place / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count('"train"') >= 1, "the first line of the log")
    ranks = {rank: pid for pid, rank in processes_of(place).items()}
    assert set(ranks) == {None, 0, 1}
    return ranks


def assert_all_gone(place):
    wait_for(lambda: not processes_of(place), "the processes to end", seconds=10)


def test_to_the_end(place):
    code, out, err = finish(start(place, "--steps", "6"))
    assert (code, err) == (0, "")
    run = place / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints", "config.json", "log.jsonl", "run.png", "summary.json"]
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["event"] == "train"] == [2, 4, 6]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_bits_per_byte"] == records[-2]["bits_per_byte"]
    assert sorted(summary["baselines_bits_per_byte"]) == ["order0", "xz -9e", "zlib -9"]
    for words in ("order-0 entropy", "zlib -9", "xz -9e", "step 6/6  loss", "tokens/s", "comm "):
        assert words in out
    assert "\x1b" not in out, "a log takes no escape codes"


def test_a_killed_rank_is_started_again_and_at_last_ends_the_run_with_its_reason(place):
    command = start(place, "--steps", "1000000", "--max-restarts", "1")
    os.kill(under_way(place)[1], signal.SIGKILL)
    log = place / "run" / "log.jsonl"
    wait_for(lambda: '"restart"' in log.read_text(), "the second attempt")
    os.kill(under_way(place)[1], signal.SIGKILL)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["number"] for r in records if r["event"] == "restart"] == [1]
    begun = time.monotonic()
    code, _, err = finish(command)
    assert time.monotonic() - begun < 10
    assert code == 1
    assert err == ("fasttrain: rank 1 was killed by SIGKILL (out of memory, or ended by somebody); "
                   "the processes' messages are in run/stderr.log\n")
    assert_all_gone(place)


def test_an_exception_in_the_ranks_ends_the_run_with_its_reason(place):
    code, _, err = finish(start(place, "--steps", "9", "--optimizer", "torch.SGD", "--lr", "1e30", "--clip", "0",
                                 "--max-skips", "3"))
    assert code == 1
    assert err.count("\n") == 1
    assert "failed: TooManyBadSteps: 3 steps in a row had a loss or gradients that are not finite" in err
    assert "use a lower learning rate" in err
    assert "Traceback" in (place / "run" / "stderr.log").read_text()


def test_control_c_ends_it_saved(place):
    command = start(place, "--steps", "1000000")
    under_way(place)
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=15) == 130
    assert not processes_of(place), "the command must wait for its processes"
    last = [json.loads(line) for line in (place / "run" / "log.jsonl").read_text().splitlines()][-1]
    assert finish(command)[2] == (f"fasttrain: asked to stop, after step {last['step']}, which is saved; the same "
                                  "command with --resume auto and --out run goes on\n")
    assert [(one.step, one.reason) for one in complete(place / "run" / "checkpoints")] == [(last["step"], None)]


def test_no_rank_outlives_the_command(place):
    command = start(place, "--steps", "1000000")
    under_way(place)
    command.kill()
    command.communicate(timeout=15)
    assert_all_gone(place)


@pytest.mark.parametrize("failures, reason", [
    ([(0, 1, "WireError: all_reduce failed: reset"), (1, -9, "")], "rank 1 was killed by SIGKILL"),
    ([(0, -15, ""), (1, 1, "ValueError: bad")], "rank 1 failed: ValueError: bad"),
    ([(0, 1, "WireError: all_reduce failed: timeout")], "rank 0 failed: WireError: all_reduce failed: timeout"),
    ([(0, 3, "")], "rank 0 failed: exit code 3"),
    ([(0, 71, ""), (1, 70, "ValueError: bad")], "rank 1 failed: ValueError: bad"),
    ([(0, 71, "PeerFailed: rank 9 failed in step 3: ValueError: bad"), (1, 143, "")],
     "rank 9 failed in step 3: ValueError: bad"),
    ([(0, 71, "PeerFailed: rank 9 failed in step 3: ValueError: bad"), (1, 1, "WireError: x")],
     "rank 9 failed in step 3: ValueError: bad"),
])
def test_the_cause_is_told_from_its_echoes(tmp_path, failures, reason):
    report = tmp_path / "failures.json"
    report.write_text(json.dumps([dict(zip(("rank", "exitcode", "message"), f, strict=True)) for f in failures]))
    assert launch._reason(report, 1).startswith(reason)


def test_torchrun_itself_may_fail(tmp_path):
    assert launch._reason(tmp_path / "absent", -9) == "torchrun was killed by SIGKILL"
    assert launch._reason(tmp_path / "absent", 3) == "torchrun failed with exit code 3"
