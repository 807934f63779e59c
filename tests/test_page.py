"""The page of runs: whole in one file, every number from the runs, nothing of theirs taken for HTML."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from test_report import make_run

from fasttrain.train import page, report

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Reader(HTMLParser):
    """Checks that elements are closed in the order in which they were opened, and keeps the cells of tables."""

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.found = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.found |= {(tag, name, value) for name, value in attributes}
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1].append(data)


@pytest.fixture
def two(tmp_path):
    a = make_run(tmp_path / "a", lr=0.1)
    b = make_run(tmp_path / "<b> & co", losses=(3.0, 2.5, 2.25), lr=0.2, final=None)
    for directory in (a, b):  # as the loop writes them now
        lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        for r in lines:
            if r["event"] == "train":
                r.update(grad_norm=0.5, memory_gb=1.0, peak_gb=2.0, skipped=3, mfu=0.41)
        (directory / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return [report.read(a), report.read(b)]


def parsed(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open
    return reader


def test_the_page_has_the_numbers_of_all_runs(two):
    text = page.page(two)
    cells = parsed(text).cells
    rows = {row[0]: row[1:] for row in cells if len(row) == 3}
    assert rows["held-out text, bits per byte"] == ["2.5000", "unfinished"]
    assert rows["last training loss, nats per byte"] == ["2.0000", "2.2500"]
    assert rows["--lr"] == ["0.1", "0.2"]
    assert "--steps" not in rows, "only what differs"
    assert rows["skipped steps"] == ["3", "3"]
    assert rows["steps"] == ["20 of 20", "30 of 20"]
    assert len(re.findall("<svg", text)) == 9
    assert "Model FLOPs utilisation" in text


def test_names_are_text_not_markup(two):
    text = page.page(two)
    assert "<b>" not in text
    assert "&lt;b&gt; &amp; co" in text


def test_it_needs_no_other_file(two):
    for tag, name, value in parsed(page.page(two)).found:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
        assert tag != "script"


def test_old_records_have_fewer_plots(tmp_path):
    text = page.page([report.read(make_run(tmp_path / "old"))])
    assert "Model FLOPs utilisation" not in text
    assert "Norm of the gradient" not in text
    assert "--optimizer" in text, "of a single run all options are shown"


def test_runs_of_one_name_are_told_apart_and_other_texts_noted(tmp_path):
    runs = [report.read(make_run(tmp_path / d / "run", sha=d)) for d in ("x", "y")]
    text = page.page(runs)
    assert str(tmp_path / "x" / "run") in text
    assert "read different texts" in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
def test_a_browser_draws_it(two, tmp_path):
    page.write(two, tmp_path / "report.html")
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,3500",
                           f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "report.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    from matplotlib.image import imread

    pixels = imread(tmp_path / "page.png")
    assert pixels.shape[:2] == (3500, 1000)
    assert (pixels[..., :3].std(axis=2) > 0.1).sum() > 1000, "coloured curves are drawn"
