"""The benchmarks of quality, at a tiny size, and that docs/storage.md says what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_codes, bench_convergence, bench_wire, main_job, plot, storage_page
from benchmarks.bench_convergence import Row
from fasttrain.optim import AdamW
from fasttrain.precision.codecs import NUMBER, POSITIVE
from tests.helpers import generator

JOB = dict(steps=3, batch=2, sequence=16, layers=1, width=32, heads=2, ngrams=2, rows=256, warmup=1)
ROWS = (Row("fp32", bf16=False), Row("8-byte", {"storage": "8-byte"}))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in "abcdef":
        (folder / f"{name}.txt").write_text(f"{name}: the quick brown fox jumps over the lazy dog\n" * 10)
    return folder


def moments(scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both signs, and positive, over many orders of magnitude, zeros among them; not whole blocks."""
    numbers = generator(5)
    size = torch.exp(scale * torch.randn(1000, generator=numbers))
    signed = size * torch.randn(1000, generator=numbers).sign()
    size[::7] = 0.0
    return signed, size


def test_other_codes_round_to_the_nearest_level() -> None:
    """Squares and fourth powers retold by search among all levels; squares are also the package's own code."""
    signed, positive = moments()
    for top, exponent, values in ((127, 1, signed), (127, 2, signed), (255, 1, positive), (255, 4, positive)):
        coded = bench_codes.in_blocks(lambda share: bench_codes.powers(top, exponent, share), 256, values is positive,  # noqa: B023
                                      values)
        for at in range(0, 1000, 256):
            block, found = values[at : at + 256].double(), coded[at : at + 256].double()
            levels = (torch.arange(top + 1).double() / top) ** exponent * block.abs().max()
            roots = (block.abs()[:, None] ** (1 / exponent) - levels[None] ** (1 / exponent)).abs()
            nearest = levels[roots.argmin(1)]
            if values is positive:
                nearest = torch.where((block > 0) & (nearest == 0), levels[1], nearest)
            torch.testing.assert_close(found, nearest * block.sign(), rtol=1e-5, atol=0)
    squares = bench_codes.in_blocks(lambda share: bench_codes.powers(127, 2, share), 256, False, signed)
    torch.testing.assert_close(bench_codes.ours(NUMBER["int8"], signed), squares, rtol=1e-5, atol=0)


def test_small_floats_of_the_benchmark() -> None:
    """All numbers of a float of 4 exponent and 3 mantissa bits without infinities, their largest brought to 1."""
    levels = torch.tensor([(bool(e) + m / 8) * 2.0 ** max(e, 1) for e in range(16) for m in range(8)]).double()
    levels /= levels.max()
    share = torch.rand(1000, generator=generator(6)).double() ** 8
    nearest = levels[(share[:, None] - levels[None]).abs().argmin(1)]
    torch.testing.assert_close(bench_codes.floats(4, 3, share.float()).double(), nearest, rtol=1e-5, atol=0)


def test_errors_of_codes() -> None:
    first, second = moments()
    exact = bench_codes.errors([(first, second)], bench_codes.as_is, bench_codes.as_is)
    assert exact == {"exp_avg": 0.0, "exp_avg_sq": 0.0, "update": 0.0}
    double = bench_codes.errors([(first, second)], lambda m: 2 * m, bench_codes.as_is)
    assert double["update"] == pytest.approx(1.0)
    coded = bench_codes.ours(NUMBER["int8"] | POSITIVE, second)
    assert torch.equal(coded == 0, second == 0)
    assert ((coded - second).abs() <= 0.06 * second).all()  # half a step of 1/8 octave, linear: 1/16 of the lower end


def test_codes_at_a_tiny_size(source: Path) -> None:
    job = {name: value for name, value in JOB.items() if name != "steps"}
    figures = bench_codes.run(2, source, **{**job, "width": 64})
    assert min(figures["elements"].values()) > 4096
    update = {(row["state"], row["code"]): row["update"] for row in figures["rows"]}
    assert update["both", "bf16"]["matrices"] < 2.0**-8  # half a unit in the last place of each
    assert update["both", "int8"]["matrices"] < update["both", "int4"]["matrices"]
    assert len(bench_codes.report(figures).splitlines()) == len(figures["rows"])
    assert storage_page.codes(figures).count("\n") == len(figures["rows"]) + 1


def test_codes_of_gradients_at_a_tiny_size(source: Path) -> None:
    job = {name: value for name, value in JOB.items() if name != "steps"}
    figures = bench_wire.run(2, source, **job)
    error = {row["code"]: row["error"] for row in figures}
    for kind in ("matrices", "embeddings"):
        assert 2.0**-12 < error["bf16"][kind] < 2.0**-8  # half a unit in the last place at most
        assert error["bf16"][kind] < error["int8"][kind] < error["e4m3"][kind] < error["e5m2"][kind]
    assert len(bench_wire.report(figures).splitlines()) == len(figures)


def test_convergence_at_a_tiny_size(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "build/partial.jsonl"
    figures = bench_convergence.run(JOB, ROWS, (0, 1), partial, source)
    assert not partial.exists()
    for row in figures["rows"]:
        assert all(5 < bits < 8.1 for bits in row["bits"])  # 8 before the first step
    assert figures["rows"][0]["bits"] != figures["rows"][1]["bits"]
    assert "the baseline" in bench_convergence.report(figures)
    assert plot.convergence(figures, tmp_path / "drawn.svg").read_text().startswith("<?xml")


def test_convergence_goes_on_where_it_was_interrupted(source: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def bits(config: Any, read: Any, row: Row) -> float:
        if len(made) == 3:
            raise InterruptedError
        made.append((row.name, config.seed))
        return 2.0 + config.seed + (row.name != "fp32")

    monkeypatch.setattr(bench_convergence, "_bits", bits)
    with pytest.raises(InterruptedError):
        bench_convergence.run(JOB, ROWS, (0, 1), tmp_path / "partial", source)
    first, made[:] = list(made), []
    figures = bench_convergence.run(JOB, ROWS, (0, 1), tmp_path / "partial", source)
    assert made == [("8-byte", 1)]
    assert first == [("fp32", 0), ("8-byte", 0), ("fp32", 1)]
    assert [row["bits"] for row in figures["rows"]] == [[2.0, 3.0], [3.0, 4.0]]


@pytest.mark.parametrize("over, worse", [(0.9, False), (1.1, True), (-5.0, False)])
def test_what_is_labelled_worse(over: float, worse: bool) -> None:
    """The seeds of fp32 differ by 1."""
    bits = [2.0, 3.0, 2.5]
    figure = bench_convergence._figure(ROWS[1], {"fp32": bits, "8-byte": [one + over for one in bits]})
    assert figure["worse"] == worse
    assert (bench_convergence.label(figure) == bench_convergence.WORSE) == worse


def test_weights_of_every_dtype_begin_at_one_point_and_learn() -> None:
    from fasttrain.train.config import TrainConfig

    config = TrainConfig(processes=1, **JOB)
    (a, _), (b, optimizer) = (main_job.make(config, dtype, {}) for dtype in (torch.float32, torch.bfloat16))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert (p.dtype, q.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(p, q.float())
    x = torch.arange(10)[None]
    assert b(x).dtype == torch.float32
    b(x).sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"])


# --- The page ---------------------------------------------------------------------------------------------------------

def test_the_page_has_the_newest_figures() -> None:
    text = storage_page.PAGE.read_text()
    assert storage_page.page(text) == text, "python -m benchmarks.storage_page writes them"


def test_bytes_of_the_page_are_counted() -> None:
    table = re.search(r"<!-- bytes -->(.*)<!-- /bytes -->", storage_page.PAGE.read_text(), re.S)
    assert table is not None
    rows = re.findall(r"^\| (none|`.*`) \| ([\d.]+) \| ([\d.]+) \|$", table[1], re.M)
    assert len(rows) == 13
    for said, memory, moved in rows:
        for options in said.split(": "):  # a preset, and what it stands for
            p = torch.nn.Parameter(torch.randn(512, 512, generator=generator(1)).bfloat16())
            p.grad = torch.randn(512, 512, generator=generator(2)).bfloat16()
            optimizer = AdamW([p], **eval(f"dict({', '.join(re.findall('`(.*?)`', options))})"))
            optimizer.step()
            kept = p.nbytes + p.grad.nbytes + sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step")
            done = optimizer.last_step
            assert kept / p.numel() == pytest.approx(float(memory), abs=0.00501), said
            assert (done.bytes_read + done.bytes_written) / p.numel() == pytest.approx(float(moved), abs=0.00501), said
