"""The main job, stopped and started again: the same numbers to the bit as if nothing had happened."""

import dataclasses

import pytest
import ranks
import torch
from test_loop import TINY, losses, make_text

from fasttrain.checkpoint.find import complete
from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import is_dtensor
from fasttrain.train import recipe, source
from fasttrain.train.config import ASKED
from fasttrain.train.division import divide
from fasttrain.train.journal import Journal, records
from fasttrain.train.loop import train
from fasttrain.train.place import Place
from fasttrain.train.rank import work

JOB = dataclasses.replace(TINY, optimizer="AdamW", rows=64, ngrams=2, save_every=4, log_every=2, wire="ordered")


def part(wire, folder, config, stop_after=None):
    """The job from its newest checkpoint on, until it ends or is asked to stop."""
    torch.manual_seed(config.seed)
    read = source.load(config) if config.tokens is not None else make_text()
    config = dataclasses.replace(config, processes=wire.size)
    divided = divide(config, Mesh(**config.axes), read.vocabulary)
    optimizer = recipe.build(config, divided.called)
    made = []
    optimizer.register_step_post_hook(lambda *_: made.append(1))
    journal = Journal(folder / "log.jsonl") if wire.rank == 0 else None

    def tell(record):
        if journal is not None:
            journal.write(record)

    class Asked:
        @property
        def asked(self):
            return stop_after is not None and len(made) >= stop_after - 1 and wire.rank == wire.size - 1

    reason = train(config, divided, optimizer, read, tell, folder, stopping=Asked())
    if journal is not None:
        journal.close()
    weights = [p.detach().full_tensor() if is_dtensor(p) else p.detach() for p in divided.called.parameters()]
    return reason, [w.clone() for w in weights]


def run(folder, config, stops=(), size=2):
    """The weights and the log of a job that is stopped after each of `stops` further steps, and started again."""
    folder.mkdir()
    for stop in stops:
        for reason, _ in ranks.run(part, size, folder, config, stop):
            assert reason == ASKED, "every rank, though one was asked"
    ended = ranks.run(part, size, folder, config)
    assert [reason for reason, _ in ended] == ["done"] * size
    return ended[0][1], records(folder / "log.jsonl")


VARIANTS = [
    {}, {"zero": 1, "precision": "bf16-pure"}, {"zero": 2, "accumulate": 2, "ema": 0.9}, {"zero": 3, "wire": "same"},
    {"precision": "fp16", "optimizer": "Lion"}, {"optimizer": "torch.SGD"}, {"wire": "int8"}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_run_that_was_stopped_ends_in_the_same_bits(tmp_path, options):
    config = dataclasses.replace(JOB, **options)
    weights, log = run(tmp_path / "whole", config)
    others, again = run(tmp_path / "stopped", config, stops=(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert losses(again) == losses(log)
    assert [r["step"] for r in again if r["event"] == "resume"] == [3, 7]
    assert [r["bits_per_byte"] for r in again if r["event"] == "validation"] == [
        r["bits_per_byte"] for r in log if r["event"] == "validation"]
    assert {one.step for one in complete(tmp_path / "stopped" / "checkpoints")} >= {8, 12}


def test_every_step_is_one_to_go_on_from(tmp_path):
    weights, _ = run(tmp_path / "whole", JOB, size=1)
    others, _ = run(tmp_path / "stopped", JOB, stops=(1,) * 11, size=1)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("stages", [(0, 2), (3, 1)])
def test_another_number_of_ranks_and_another_stage_go_on(tmp_path, stages):
    """The data is the same; sums over ranks are rounded otherwise, so the weights differ by little."""
    whole, log = run(tmp_path / "whole", JOB)
    (tmp_path / "changed").mkdir()
    wire = {3: "same"}
    for size, stage, stop in ((2, stages[0], 5), (1, stages[1], 4), (4, stages[1], None)):
        config = dataclasses.replace(JOB, processes=size, zero=stage, wire=wire.get(stage, "ordered"))
        ended = ranks.run(part, size, tmp_path / "changed", config, stop)
    again = records(tmp_path / "changed" / "log.jsonl")
    assert [r["step"] for r in again if r["event"] == "train"] == [r["step"] for r in log if r["event"] == "train"]
    assert losses(again) == pytest.approx(losses(log), rel=1e-5)
    for a, b in zip(whole, ended[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def work_again(wire, folder, config):
    return work(config, Place(wire.rank, wire.size, wire.rank, wire.size), lambda wire: (make_text(), folder)).reason


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_in_its_log(tmp_path):
    config = dataclasses.replace(JOB, processes=1, save_every=0, steps=4)
    journal = Journal(tmp_path / "log.jsonl")
    for step in (2, 4):
        journal.write({"event": "train", "step": step, "loss": 9.0})
    journal.close()
    assert ranks.run(work_again, 1, tmp_path, config) == ["done"]
    told = [(r["event"], r["step"]) for r in records(tmp_path / "log.jsonl")]
    assert told[:4] == [("begin", 0), ("validation", 0), ("train", 2), ("train", 4)]
    assert 9.0 not in losses(records(tmp_path / "log.jsonl"))
