"""The main job over the axes of a mesh: the numbers of one process; saved under one mesh, gone on under others."""

import dataclasses

import pytest
import ranks
import torch
from test_loop import TINY, make_text

from fasttrain.dist.mesh import Mesh
from fasttrain.train import checking, recipe
from fasttrain.train.config import ASKED
from fasttrain.train.division import divide
from fasttrain.train.journal import Journal, records
from fasttrain.train.loop import train

JOB = dataclasses.replace(TINY, optimizer="AdamW", layers=2, heads=4, batch=8, ngrams=2, rows=64, steps=6, log_every=1,
                          validate_every=3, save_every=2, tied=True)


def part(wire, folder, config, stop_after=None):
    """The job from its newest checkpoint on, until it ends or is asked to stop: its records."""
    config = dataclasses.replace(config, processes=wire.size)
    checking.check(config)
    torch.manual_seed(wire.rank)  # nothing may depend on it
    read, mesh = make_text(), Mesh(**config.axes)
    divided = divide(config, mesh, read.vocabulary)
    optimizer = recipe.build(config, divided.called)
    made = []
    optimizer.register_step_post_hook(lambda *_: made.append(1))
    journal = Journal(folder / "log.jsonl") if wire.rank == 0 else None

    class Asked:
        @property
        def asked(self):
            return stop_after is not None and len(made) >= stop_after - 1 and wire.rank == wire.size - 1

    reason = train(config, divided, optimizer, read, journal.write if journal else lambda record: None, folder,
                   stopping=Asked())
    if journal is not None:
        journal.close()
    return reason


def numbers(folder):
    """Losses of steps, validations, and the record of the wire."""
    found = records(folder / "log.jsonl")
    return ([(r["step"], r["loss"]) for r in found if r["event"] == "train"],
            [(r["step"], r["bits_per_byte"]) for r in found if r["event"] == "validation"],
            next(r for r in found if r["event"] == "wire") if any(r["event"] == "wire" for r in found) else None)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    found = {}
    for experts in (0, 4):
        folder = tmp_path_factory.mktemp(f"alone{experts}")
        ranks.run(part, 1, folder, dataclasses.replace(JOB, experts=experts))
        found[experts] = numbers(folder)
    return found


def close(got, wanted):
    assert [step for step, _ in got] == [step for step, _ in wanted]
    torch.testing.assert_close(torch.tensor([value for _, value in got]), torch.tensor([value for _, value in wanted]),
                               rtol=2e-3, atol=2e-3)  # fp32: other orders of sums, through six steps


WAYS = [dict(tensor=2, pipeline=2, accumulate=4, sequence_parallel=True),
        dict(context=2, zero=3, copies=1), dict(expert=2, tensor=2, experts=4),
        dict(pipeline=2, stages=2, pipeline_schedule="zero-bubble", accumulate=2, zero=3)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_losses_do_not_depend_on_the_mesh(tmp_path, alone, way):
    assert ranks.run(part, 4, tmp_path, dataclasses.replace(JOB, **way)) == ["done"] * 4
    losses, validations, wire = numbers(tmp_path)
    close(losses, alone[way.get("experts", 0)][0])
    close(validations, alone[way.get("experts", 0)][1])
    if way.get("context", 1) > 1:
        assert wire["bytes"] is None  # torch adds up the copies of a shard, and our wires do not see that
    else:  # beside gradients and activations: what compares each step, and what tells the loss
        assert wire["formula"] < wire["bytes"] < wire["formula"] + 4096


def test_a_run_goes_on_under_other_meshes(tmp_path, alone):
    """Stopped after every second step, and started again with the work divided otherwise."""
    ways = [dict(tensor=2), dict(pipeline=2, accumulate=2), dict(zero=3)]
    for number, way in enumerate(ways):
        reasons = ranks.run(part, 2, tmp_path, dataclasses.replace(JOB, **way), None if number == 2 else 2)
        assert reasons == ["done" if number == 2 else ASKED] * 2
    losses, validations, _ = numbers(tmp_path)
    close(losses, alone[0][0])
    close(validations, alone[0][1])
    told = [r["text"] for r in records(tmp_path / "log.jsonl") if r["event"] == "resume"]
    assert [text.split(";")[0] for text in told] == ["resumed from step-000000000002", "resumed from step-000000000004"]
