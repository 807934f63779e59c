"""`make gpu` without a GPU: every benchmark's code at tiny sizes, its budgets, its errors, and what it draws."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_rows import ROW
from helpers import needs_native

from benchmarks.__main__ import main
from benchmarks.gpu import command, machine, table, worker
from benchmarks.gpu.bench import AGAIN, OURS, Bench
from benchmarks.gpu.processes import Done, execute

CPU = torch.device("cpu")


# --- Every work -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    try:
        worker.run(list(worker.WORKS), Bench(CPU, dry=True), time.time(), found.append)
    finally:
        torch.set_num_threads(before)
    return found


def rows_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line["row"] for line in lines if "row" in line]


@needs_native
def test_every_work_runs_and_says_what_the_tables_need(lines):
    assert [line["error"] for line in lines if "error" in line] == []
    assert [line["work"] for line in lines if "seconds" in line] == list(worker.WORKS)
    assert {line["work"] for line in lines if "row" in line} == set(worker.WORKS)
    for row in rows_of(lines):
        assert json.loads(json.dumps(row)) == row
        assert row["rounds"] >= 1
        assert all(value > 0 for value in row["value"].values()), row["work"]
        assert row["unit"] in table.cells(row)[0]


@needs_native
def test_bytes_are_counted_against_the_ceiling(lines):
    rows = {row["work"]: row for row in rows_of(lines)}
    ceiling = rows["copy"]["bytes_per_second"]
    row = rows["AdamW, fp32: 1e9 in 300 tensors"]
    seconds = row["value"][OURS] / 1e3
    assert row["of_copy"] == pytest.approx(28 * row["elements"] / seconds / ceiling)
    assert row["elements"] == 9 * 24
    assert {"torch fused", "torch foreach"} <= set(row["ratio"])
    assert AGAIN not in row["value"]
    assert "spread" in row
    assert set(row["absent"]) | set(row["value"]) >= {"apex", "TransformerEngine", "DeepSpeed", "optimi"}


@needs_native
def test_every_row_of_the_readme_has_its_figures_or_says_why_not(lines):
    rows = rows_of(lines)
    missing = {aim.work for aim in table.AIMS if not table.chosen(aim, rows)}
    tiny = {aim.work for aim in table.AIMS if aim.section == "host" and aim.part != "in buckets"}  # other counts
    there = "import to first step, compiled ahead of time"
    later = {aim.work for aim in table.AIMS if aim.section == "start" or "CUDA graph" in aim.work} - {there}
    assert missing == tiny | later
    assert {row["section"] for row in rows} == {aim.section for aim in table.AIMS}


@needs_native
def test_the_command_in_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    assert main(["gpu", "--dry", "--only", "tests", "benchmarks", "--works", "ceiling", "adamw"]) == 0
    said = capsys.readouterr().out
    assert "DRY RUN" in said
    assert "benchmarks: 2 of 2 works" in said
    assert "tests: not run: a dry run" in said
    (path,) = tmp_path.glob("fasttrain-gpu-*/*-gpu.json")
    found = json.loads(path.read_text())
    assert set(found) == {"machine", "figures"}
    assert {"date", "commit", "packages", "gpu", "driver"} <= set(found["machine"])
    assert [row["work"] for row in found["figures"]["rows"]] == ["copy", ROW["work"]]
    assert found["figures"]["failed"] == {}


# --- What cannot work -------------------------------------------------------------------------------------------------

def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(machine, "ask", lambda: {"why_not": "torch 9 can use no GPU here: no driver"})
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert "no GPU to measure: torch 9 can use no GPU here: no driver." in said
    assert "--dry" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_torch_says_is_handed_on():
    assert machine.gpu()["why_not"].startswith(f"torch {torch.__version__} can use no GPU here: ")


def test_a_driver_that_is_too_old_is_named(monkeypatch):
    said = "The NVIDIA driver on your system is too old (found version 12020).\nPlease update"

    def init() -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "init", init)
    assert machine.gpu() == {"why_not": f"torch {torch.__version__} can use no GPU here: {said.splitlines()[0]}"}


def test_an_old_architecture_is_refused():
    assert "Tesla T4 has compute capability 7.5" in machine.refusal((7, 5), "Tesla T4")
    assert machine.refusal((8, 0), "A100") == machine.refusal((12, 0), "RTX") == ""


def test_unknown_works_are_listed(capsys):
    assert command.main(["--dry", "--works", "adamv"]) == 2
    assert "unknown: adamv; there are ceiling, adamw," in capsys.readouterr().err


# --- Time and failures ------------------------------------------------------------------------------------------------

def test_each_part_leaves_what_is_kept_for_later_ones(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    clock = command.Clock(525.0, list(command.PARTS))
    assert clock.limit("build") == 525 - 120 - 60 - 165
    now += 30  # a quick build: the tests may take what it left
    assert clock.limit("tests") == 495 - 60 - 165
    now += 480
    assert clock.limit("benchmarks") == 15
    now += 20
    assert clock.limit("benchmarks") == 0


def test_the_parts_fit_into_nine_minutes():
    assert sum(command.PARTS.values()) <= command.SECONDS <= 530


def test_a_process_is_ended_with_its_children():
    code = "import subprocess, sys, time; print('began', flush=True); subprocess.run(['sleep', '60'])"
    done = execute([sys.executable, "-c", code], 2.0)
    assert (done.status, done.said) == (None, "began\n")
    assert done.seconds < 10


def test_works_that_do_not_fit_are_cut():
    found: list[dict[str, Any]] = []
    worker.run(["adamw"], Bench(CPU), time.time() + 1, found.append)
    assert [line["work"] for line in found] == ["adamw"]
    assert found[0]["cut"].startswith("not run: out of time")


def test_an_error_ends_its_work_alone(monkeypatch, capsys):
    def broken(_: Bench) -> list[dict[str, Any]]:
        raise ValueError("no such thing")

    monkeypatch.setitem(worker.WORKS, "adamw", worker.Work(broken, 0, 1))
    monkeypatch.setitem(worker.WORKS, "muon", worker.Work(lambda _: [ROW], 0, 1))
    found: list[dict[str, Any]] = []
    assert worker.run(["adamw", "muon"], Bench(CPU, dry=True), time.time(), found.append)
    report = command.Report()
    assert command.take(report, found) == ["adamw", "muon"]
    assert report.failed == {"adamw": "ValueError: no such thing"}
    assert report.rows == [ROW]
    assert "no such thing" in capsys.readouterr().err


class Script:
    """Stands for `execute`: writes the next lines into the worker's file, and ends as told."""

    def __init__(self, *turns: tuple[list[dict[str, Any]], int | None]):
        self.turns, self.asked = list(turns), []

    def __call__(self, arguments: list[str], limit: float, late: Any = None) -> Done:
        written, status = self.turns.pop(0)
        out = Path(arguments[arguments.index("--out") + 1])
        out.write_text("".join(json.dumps(line) + "\n" for line in written))
        self.asked.append(arguments)
        return Done(status, "it said this", 1.0)


def test_a_work_that_brings_the_process_down_is_named_and_the_rest_goes_on(monkeypatch):
    began = {"began": time.time()}
    row = {"row": ROW, "ceiling": 4e12}
    first = [{"work": "ceiling", **began}, {"work": "ceiling", **row}, {"work": "ceiling", "seconds": 1},
             {"work": "adamw", **began}]
    second = [{"work": "muon", **began}, {"work": "muon", **row}]  # what it measured before is kept
    third = [{"work": "ema", **began}, {"work": "ema", **row}, {"work": "ema", "seconds": 1}]
    script = Script((first, -11), (second, None), (third, 0))
    monkeypatch.setattr(command, "execute", script)
    report = command.Report()
    command.benchmarks(report, 100.0, ["ceiling", "adamw", "muon", "ema"], dry=False)
    assert report.failed == {"adamw": "the process died with status -11: it said this"}
    assert report.cut["muon"].startswith("not finished: ended after")
    assert len(report.rows) == 3
    assert [asked[-1] for asked in script.asked] == ["ema"] * 3
    assert "--ceiling" not in script.asked[0]
    assert script.asked[1][script.asked[1].index("--ceiling") + 1] == str(4e12)
    assert report.broken == ["benchmarks"]


def test_a_worker_that_never_begins_does_not_loop(monkeypatch):
    monkeypatch.setattr(command, "execute", Script(([], 1), ([], 1)))
    report = command.Report()
    command.benchmarks(report, 100.0, ["ceiling", "adamw"], dry=False)
    assert set(report.failed) == {"ceiling", "adamw"}


def test_a_build_that_fails_is_tried_without_device_code(monkeypatch, capsys):
    asked = []

    def cmake(limit: float, cuda: str) -> Done:
        asked.append(cuda)
        return Done(0 if cuda == "off" else 1, "error: no such header", 1.0)

    monkeypatch.delenv("FASTTRAIN_CUDA", raising=False)
    monkeypatch.setattr(command, "cmake", cmake)
    monkeypatch.setattr(command, "tool", lambda name: "/nvcc")
    report = command.Report()
    command.build(report, 100.0, dry=False)
    assert asked == ["on", "off"]
    assert report.broken == ["build"]
    assert "error: no such header" in capsys.readouterr().out


def test_outcomes_are_counted_of_a_run_that_was_ended():
    said = ("tests/test_a.py::test_b[c d] PASSED [ 10%]\ntests/test_a.py::test_c FAILED [ 20%]\n"
            "[gw3] [ 30%] PASSED tests/test_a.py::test_d \ntests/test_a.py::test_e")
    assert command.outcomes(said) == {"PASSED": 2, "FAILED": 1, "ERROR": 0, "SKIPPED": 0}


@pytest.mark.parametrize("done, said, bad", [
    (Done(0, "", 1), "clean", False), (Done(9, "ERROR SUMMARY: 1 error", 1), "found errors", True),
    (Done(1, "Device not supported", 1), "not run: the tool does not support this device", False),
    (Done(1, "Traceback", 1), "failed with status 1", True), (Done(None, "", 1), "not finished: out of time", False)])
def test_verdicts_of_the_sanitizer(done, said, bad):
    assert command.verdict_of(done) == (said, bad)


def test_gpu_test_files_are_found():
    files = command.test_files()
    assert "tests/test_gpu_step.py" in files
    assert "tests/test_gpu_command.py" not in files
