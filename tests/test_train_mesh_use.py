"""The main job over a mesh: who reads what, what is skipped, what it sends, and how it ends when a rank does."""

import dataclasses
import os
import signal

import pytest
import ranks
from test_loop import make_text
from test_train_mesh import JOB

from fasttrain.dist.failures import PEER_FAILED, PeerFailed
from fasttrain.dist.mesh import Mesh
from fasttrain.train import checking, loop, recipe
from fasttrain.train.division import divide

SHORT = dataclasses.replace(JOB, steps=3, save_every=0, warmup=1)


def trained(wire, config, prepare=lambda mesh, divided, optimizer: None, **options):
    """Train, and return the mesh and the records; `prepare` is called before."""
    config = dataclasses.replace(config, processes=wire.size)
    checking.check(config)
    read, mesh, records = make_text(), Mesh(**config.axes, **options), []
    divided = divide(config, mesh, read.vocabulary)
    optimizer = recipe.build(config, divided.called)
    prepare(mesh, divided, optimizer)
    loop.train(config, divided, optimizer, read, records.append)
    return mesh, records


def samples(wire, config):
    seen = []

    class Seen(loop.Loader):
        def __next__(self):
            batch = super().__next__()
            seen.append(batch["tokens"].tolist())
            return batch

    loop.Loader = Seen  # in this process, which ends with it
    return trained(wire, config)[0].replica, seen


@pytest.fixture(scope="module")
def read_by():
    """What each of two replicas reads, where nothing else is divided."""
    found = dict(ranks.run(samples, 2, SHORT))
    assert sorted(found) == [0, 1]
    assert found[0] != found[1]
    return found


@pytest.mark.parametrize("way", [dict(tensor=2), dict(pipeline=2, accumulate=2), dict(context=2),
                                 dict(expert=2, experts=2, tensor=2)], ids=str)
def test_samples_depend_on_the_number_of_replicas_alone(read_by, way):
    answers = ranks.run(samples, 4, dataclasses.replace(SHORT, **way))
    assert sorted(replica for replica, _ in answers) == [0, 0, 1, 1]
    for replica, seen in answers:
        assert seen == read_by[replica]


def poisoned(wire, config, who):
    def prepare(mesh, divided, optimizer):
        calls, params = [], dict(divided.called.module.named_parameters())

        def spoil(grad):
            calls.append(1)
            if wire.rank == who and len(calls) == 2 * config.accumulate:
                grad = grad.clone()
                grad.to_local().view(-1)[0] = float("nan")
            return grad

        if name := next((name for name in params if name.endswith("1.down.weight")), None):
            params[name].register_hook(spoil)

    return [{key: r[key] for key in ("event", "step", "text")} for r in trained(wire, config, prepare)[1]
            if r["event"] == "skipped"]


def test_a_gradient_that_is_not_finite_in_one_part_is_named_on_every_rank():
    """Also in the log, which the first rank writes: it has neither that stage nor those rows."""
    answers = ranks.run(poisoned, 4, dataclasses.replace(SHORT, tensor=2, pipeline=2, accumulate=2), 3)
    assert all(answer == answers[0] for answer in answers)
    (told,) = answers[0]
    assert told["step"] == 2
    assert told["text"].endswith("a gradient is not finite in blocks.1.down.weight")


def sent(wire, config):
    def prepare(mesh, divided, optimizer):
        if config.zero < 3:
            elements.extend(bucket.elements for bucket in divided.model.reducer.layout.buckets)

    elements = []
    return trained(wire, config, prepare)[1][-1], sum(elements)


def test_the_formula_knows_how_wide_parameters_are():
    for record, _ in ranks.run(sent, 2, dataclasses.replace(SHORT, zero=3, precision="bf16-pure")):
        assert 0 <= record["bytes"] - record["formula"] < 200


def test_what_zero_gathers_of_tied_parameters_is_counted():
    """It goes over wires of its own: the gradients of tied parameters are added over stages, too."""
    activations = 4 * SHORT.sequence * SHORT.width * 4
    for record, elements in ranks.run(sent, 4, dataclasses.replace(SHORT, zero=1, pipeline=2, accumulate=2)):
        assert record["bytes"] >= activations + 4 * elements  # half of all gradients, and half of all parameters


def killed(wire, watcher, config):
    def prepare(mesh, divided, optimizer):
        calls = []

        def strike(*_):
            calls.append(1)
            if wire.rank == 1 and len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        divided.called.module.blocks[0].up.register_forward_pre_hook(strike)

    with watcher.guard():
        trained(wire, config, prepare, watch=watcher, timeout_s=wire.timeout_s)


def test_a_rank_killed_within_the_model_is_named_by_those_that_torch_has_wait_for_it():
    """In a collective of a tensor-parallel layer, whose error only says that a connection was closed."""
    first, second = ranks.faulty(killed, 2, dataclasses.replace(SHORT, tensor=2), timeout_s=10)
    assert second.code == -signal.SIGKILL
    assert first.code == PEER_FAILED
    assert f"{PeerFailed.__name__}: rank 1 failed: process" in first.text.splitlines()[-1]
    assert "gloo" in first.text


@pytest.mark.parametrize("way", [dict(pipeline=2, accumulate=2, context=2),
                                 dict(pipeline=2, accumulate=2, precision="bf16-pure"),
                                 dict(pipeline=2, accumulate=2, stages=2, pipeline_schedule="zbv", recompute="full")],
                         ids=str)  # the last has a process without a block
def test_stages_are_cut_whatever_computes_in_them(way):
    records = ranks.run(trained_records, 4, dataclasses.replace(SHORT, **way))[0]
    alone = ranks.run(trained_records, 1, SHORT)[0]
    pairs = [[r["loss"] for r in found if r["event"] == "train"] for found in (records, alone)]
    assert pairs[0] == pytest.approx(pairs[1], rel=2e-2 if "precision" in way else 1e-5)


def trained_records(wire, config):
    return trained(wire, config)[1]


def dry(wire, config):
    return trained(wire, config)[1]


def test_a_dry_run_tells_what_the_largest_process_has_and_what_all_save():
    config = dataclasses.replace(SHORT, dry_run=True, tied=False)
    (alone,) = ranks.run(dry, 1, config)[0]
    for way in (dict(tensor=2, pipeline=2, accumulate=2), dict(tensor=2, zero=3),
                dict(pipeline=2, accumulate=2, zero=1)):
        answers = [answer[0] for answer in ranks.run(dry, 4, dataclasses.replace(config, **way))]
        assert all(answer["bytes"] == answers[0]["bytes"] for answer in answers)
        assert answers[0]["checkpoint_bytes"] == pytest.approx(alone["checkpoint_bytes"], rel=1e-2)
        assert 0.2 < answers[0]["bytes"]["states"] / alone["bytes"]["states"] < 0.6
