"""What a plan says of ranks that divide a model, beside what gloo ranks really keep and send: equal to the byte."""

import pytest
from planned import Sent, elements, job_of, kept, local, model_of, sizes, whole
from ranks import run

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.context import ContextParallel
from fasttrain.parallel.tensor.parallelize import tensor_parallel
from fasttrain.plan import kept as planned
from fasttrain.plan import states, traffic
from fasttrain.plan.job import Way


def over_tensor(wire, model_sizes, precision, sequence, how):
    mesh = Mesh(tensor=wire.size, watch=False)
    model, chosen = model_of(model_sizes, precision, how)
    tensor_parallel(model, mesh, sequence=sequence)
    with Sent(wire.size) as sent:
        bytes_kept, loss = kept(model, chosen)
        loss.backward()
    held = [(local(p.detach()).shape, local(p.detach()).dtype) for p in model.parameters()]
    return bytes_kept, dict(sent.bytes), elements(model), held


@pytest.mark.parametrize("model, precision, sequence, how", [
    (sizes(), "fp32", False, "none"), (sizes(2, True, True, 3), "fp32", True, "none"),
    (sizes(2, True), "bf16", True, "full"), (sizes(ngrams=2), "bf16-pure", False, "full"),
    (sizes(2, False, True), "fp32", True, "full")])
def test_tensor_parallel(model, precision, sequence, how):
    job, way = job_of(model, precision), Way(tensor=2, sequence=sequence, recompute=how)
    here = whole(job, tensor=2)
    for bytes_kept, sent, held, shapes in run(over_tensor, 2, model, precision, sequence, how):
        assert bytes_kept == sum(planned.of_stage(here, job, way))
        assert held == here.elements
        assert states.kept(here, job, way).weights == sum(s.numel() * d.itemsize for s, d in shapes)
        link, = traffic.links(here, job, way, 8)
        assert link.axis == "tensor"
        assert sum(sent.values()) == link.sent - traffic.of_loss(job, way), sent  # the loss has a collective of its own


def over_context(wire, model_sizes, precision, how):
    mesh = Mesh(context=wire.size, watch=False)
    model, chosen = model_of(model_sizes, precision, how)
    model.context = context = ContextParallel(mesh)
    bytes_kept, loss = kept(model, chosen)
    loss.backward()
    return bytes_kept, context.wire.bytes.total()


@pytest.mark.parametrize("model, precision, how", [
    (sizes(), "fp32", "none"), (sizes(2, True, True, 3), "fp32", "full"), (sizes(1), "bf16-pure", "none")])
def test_context_parallel(model, precision, how):
    job, way = job_of(model, precision), Way(context=2, recompute=how)
    here = whole(job)
    first, last = run(over_context, 2, model, precision, how)
    expected = sum(planned.of_stage(here, job, way))
    size = job.sequence // 4
    unmasked = 0 if how == "full" else job.shape.layers * job.act * size * size  # the first chunk of all needs no mask
    assert (first[0], last[0]) == (expected - unmasked, expected)
    link = next(link for link in traffic.links(here, job, way, 8) if link.axis == "context")
    assert first[1] == last[1] == link.sent


def over_both(wire, model_sizes, sequence):
    mesh = Mesh(tensor=2, context=2, watch=False)
    model, chosen = model_of(model_sizes, "fp32")
    tensor_parallel(model, mesh, sequence=sequence)
    model.context = context = ContextParallel(mesh)
    with Sent(2) as sent:
        bytes_kept, loss = kept(model, chosen)
        loss.backward()
    return bytes_kept, sum(sent.bytes.values()), context.wire.bytes.total()


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_and_context_parallel_together(sequence):
    model = sizes(2, True, True, 2)
    job, way = job_of(model), Way(tensor=2, context=2, sequence=sequence)
    here = whole(job, tensor=2)
    answers = run(over_both, 4, model, sequence)
    expected, size = sum(planned.of_stage(here, job, way)), job.sequence // 4
    links = {link.axis: link.sent for link in traffic.links(here, job, way, 8)}
    for rank, (bytes_kept, over_tensor, over_context) in enumerate(answers):
        unmasked = job.shape.layers * job.act * size * size if rank < 2 else 0
        assert bytes_kept == expected - unmasked
        assert (over_tensor, over_context) == (links["tensor"] - traffic.of_loss(job, way), links["context"])
