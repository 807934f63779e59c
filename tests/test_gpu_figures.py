"""What `make gpu` draws of its figures: tables, bars, the README."""

from __future__ import annotations

import doctest

import pytest
from gpu_rows import ROW, results
from helpers import ROOT

from benchmarks import plot, readme
from benchmarks.gpu import machine, processes, table
from benchmarks.gpu.processes import Done


def test_figures_that_were_never_measured_are_shown_as_such():
    lines = table.page(None)
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == len(table.AIMS)
    assert all(table.NOT_MEASURED in line for line in rows)
    assert not any(character.isdigit() for line in rows for character in line.split("|")[4])


def test_measured_figures_stand_in_their_row():
    lines = table.page(results([ROW]))
    assert lines[0].startswith("Test, driver 1.2, torch 9, triton none, commit abc, 2000-01-01")
    (row,) = [line for line in lines if ROW["work"] in line]
    assert row.endswith("| 6.54 ms ±0.4% | 95% | peer 1.07x |")
    assert sum(table.NOT_MEASURED in line for line in lines) == len(table.AIMS) - 1
    assert "Not there to compare with: apex." in lines


def test_the_short_table_names_what_was_cut_and_what_failed():
    said = table.short([ROW], {"muon": "not run: out of time"}, {"ema": "ValueError: x\nmore"})
    assert "95%  peer 1.07x" in said
    assert "not run: out of time" in said
    assert said.endswith("FAILED: ValueError: x")


def test_bars(tmp_path):
    assert plot.gpu([ROW, {"work": "copy"}], tmp_path / "gpu.svg").stat().st_size > 1000


def test_the_readme_has_the_newest_figures():
    text = readme.README.read_text()
    assert readme.page(text) == text, "make figures writes them"


@pytest.mark.parametrize("module", [machine, table])
def test_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_the_end_of_what_a_process_said():
    assert processes.ROOT == ROOT
    assert Done(0, "a\nb\nc\n", 1.0).tail(2) == "b\nc"
