"""Models cut into stages: the best cut, what each rank holds, and what cannot be cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipelines import entropy, gpt, tokens
from ranks import run
from torch import Tensor, nn

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.pipeline import Pipeline, split, ties
from fasttrain.parallel.pipeline import costs as costing
from fasttrain.parallel.pipeline import held as holding
from fasttrain.parallel.pipeline.cuts import cut
from fasttrain.parallel.pipeline.placement import Placement
from fasttrain.parallel.tensor import tensor_parallel
from fasttrain.train.model import GPT


def sums(costs: list[float], counts: list[int]) -> list[float]:
    ends = list(itertools.accumulate([0, *counts]))
    return [sum(costs[begin:end]) for begin, end in itertools.pairwise(ends)]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_the_cut_is_the_best_of_all(costs: list[int], stages: int) -> None:
    if stages > len(costs):
        with pytest.raises(ValueError, match=f"{len(costs)} parts cannot be cut into {stages} stages"):
            cut(costs, stages)
        return

    def worth(counts: list[int]) -> tuple[float, float]:
        return max(sums(costs, counts)), sum(one * one for one in sums(costs, counts))

    ways = [[end - begin for begin, end in itertools.pairwise([0, *ends, len(costs)])]
            for ends in itertools.combinations(range(1, len(costs)), stages - 1)]
    found = cut(costs, stages)
    assert min(found) >= 1
    assert worth(found) == min(map(worth, ways))


def test_places() -> None:
    assert [Placement(4, 2, "loop").of(rank) for rank in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [Placement(4, 2, "v").of(rank) for rank in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]
    assert Placement(4, 2, "loop").last == 3
    assert Placement(4, 2, "v").last == 0


# --- Costs ------------------------------------------------------------------------------------------------------------

def test_costs_are_counted_without_running() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    assert costing.counted(model) == [0, 8 * 16 + 16, 0, 16 * 4]
    sample = torch.zeros(5, dtype=torch.int64, device="meta")
    assert costing.counted(model, sample) == [0, 3 * 2 * 5 * 8 * 16, 0, 3 * 2 * 5 * 16 * 4]


class Clock:
    """In the place of the time: it goes on where somebody works."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Busy(nn.Module):
    def __init__(self, clock: Clock, seconds: float):
        super().__init__()
        self.weight, self.clock, self.seconds, self.calls = nn.Parameter(torch.ones(2, 2)), clock, seconds, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        self.clock.now += self.seconds * (100 if self.calls in (1, 4) else 1)  # the first time, and once in a while
        return x @ self.weight + 0 * torch.rand(())


def test_costs_are_measured_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(costing, "time", clock)
    model, state = nn.Sequential(Busy(clock, 1.0), Busy(clock, 3.0)), torch.get_rng_state()
    assert costing.measured(model, torch.ones(4, 2)) == [1.0, 3.0]      # medians
    assert torch.equal(torch.get_rng_state(), state)
    assert all(block.seen == 0 and block.weight.grad is None for block in model)


# --- What a rank holds ------------------------------------------------------------------------------------------------

def holds(wire: Any) -> Any:
    mesh = Mesh(pipeline=wire.size, watch=False)
    stage = split(gpt(True), mesh, costs=[1, 2, 2, 2, 2, 2, 2, 2, 10], schedule="1f1b")
    rows = split([nn.Linear(2, 2) for _ in range(6)], mesh, schedule="interleaved")
    costing.time = clock = Clock()  # type: ignore[assignment]
    busy = nn.Sequential(Busy(clock, 1.0), Busy(clock, 1.0), Busy(clock, 3.0 + wire.rank))
    measured = split(busy, mesh, costs="measured", sample=torch.ones(4, 2))
    with torch.device("meta"):
        empty = GPT(layers=2, width=8, heads=2, positions=5, vocabulary=11)
    on_meta = split(empty, mesh, costs="measured", sample=torch.zeros(2, 5, dtype=torch.int64))
    return ([name for name, _ in stage.named_parameters(remove_duplicate=False)], holding.of(stage).stages,
            sorted(rows.state_dict()), ties(stage), holding.names_of_whole(stage), holding.of(stage).table(),
            holding.of(measured).stages, [name for name, _ in on_meta.named_parameters()], holding.of(on_meta).stages)


def cut_within(wire: Any) -> Any:
    mesh = Mesh(tensor=2, watch=False)
    model = tensor_parallel(gpt(True), mesh)
    return holding.of(split(model, mesh, costs="measured", sample=tokens(2, 0)[0])).costs


def test_parts_that_several_ranks_compute_are_measured_by_all_of_them() -> None:
    first, second = run(cut_within, 2)
    assert first == second
    assert first[0] > 0


def test_what_is_held() -> None:
    first, second = run(holds, 2)
    whole = [name for name, _ in gpt(True).named_parameters(remove_duplicate=False)]
    assert sorted(first[0] + second[0]) == sorted(whole)
    assert first[1] == second[1] == [["embedding", *(f"blocks.{i}" for i in range(6))], ["blocks.6", "head"]]
    assert not set(first[2]) & set(second[2])
    assert sorted(first[2] + second[2]) == sorted(f"{i}.{kind}" for i in range(6) for kind in ("weight", "bias"))
    assert list(first[3].values()) == list(second[3].values()) == [(0, 1)]
    assert second[4] == {"head.weight": "embedding.bytes.weight"}
    assert "blocks.6 .. head" in first[5]
    assert first[6] == second[6] == [["0", "1"], ["2"]]
    assert not set(first[7]) & set(second[7])
    assert first[8] == second[8]


# --- What cannot be ---------------------------------------------------------------------------------------------------

class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def refused(wire: Any) -> list[str]:
    """The texts of all errors: the same on every rank; and the pipeline still works."""
    mesh = Mesh(pipeline=wire.size, watch=False)
    texts = []

    def says(kind: type[Exception], work: Any) -> None:
        with pytest.raises(kind) as raised:
            work()
        texts.append(str(raised.value))

    says(ValueError, lambda: split([nn.Linear(2, 2)], mesh))
    says(ValueError, lambda: split(gpt(layers=1), mesh, schedule="zbv"))
    says(ValueError, lambda: split(gpt(), mesh, costs=[1.0]))
    says(ValueError, lambda: split(gpt(), mesh, costs="guessed"))
    says(ValueError, lambda: split(gpt(), mesh, costs="measured"))
    says(ValueError, lambda: split(gpt(), mesh, schedule="2f2b"))
    says(ValueError, lambda: split(gpt(), mesh, 2, schedule="1f1b"))
    says(ValueError, lambda: split(gpt(), mesh, 3, schedule="zbv"))
    says(ValueError, lambda: split([nn.Linear(2, 2) for _ in range(2 + wire.rank)], mesh))
    says(ValueError, lambda: split(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3)), mesh, costs="measured",
                                   sample=torch.ones(1, 2)))
    says(TypeError, lambda: split(Plain(), mesh))
    says(TypeError, lambda: Pipeline(gpt(), mesh, entropy, micro_batches=2))
    stage = split(gpt(), mesh)
    says(ValueError, lambda: Pipeline(stage, mesh, entropy, micro_batches=1))
    says(ValueError, lambda: Pipeline(stage, mesh, entropy, "zbv", micro_batches=4))
    says(ValueError, lambda: Pipeline(split(gpt(), mesh, schedule="interleaved"), mesh, entropy, micro_batches=5))
    pipeline = Pipeline(stage, mesh, entropy, micro_batches=4)
    says(ValueError, lambda: pipeline.step(*tokens(6, 0)))
    says(ValueError, lambda: pipeline.step(tokens(8, 0)[0], tokens(4, 0)[1][:3]))
    says(RuntimeError, lambda: pipeline.update(None))
    broken = Pipeline(split([nn.Linear(2, 3), nn.Linear(2, 2), nn.Linear(4, 2)], mesh, costs=[1, 1, 9]), mesh, entropy,
                      micro_batches=2)
    says(RuntimeError, lambda: broken.step(torch.ones(2, 2)))
    pipeline.step(*tokens(8, 0))
    return texts


def test_what_is_refused() -> None:
    first, second = run(refused, 2)
    assert first == second
    expected = ["1 parts cannot be cut into 2 stages", "3 parts cannot be cut into 4 stages", "1 costs for 9 parts",
                "'guessed'", "needs a sample", "no schedule '2f2b'", "stages_per_rank is 2", "stages_per_rank is 3",
                "rank 0 has parts", "could not be measured on the first rank", "Plain does not say how it is cut",
                "was not split", "needs 2 micro-batches or more, and there are 1", "give schedule to split()",
                "take 4 or 6", "inputs of 6 samples do not divide into 4 micro-batches",
                "targets of 3 samples do not divide", "call step() first", "stage 0 failed on rank 0"]
    for text, words in zip(first, expected, strict=True):
        assert words in text
