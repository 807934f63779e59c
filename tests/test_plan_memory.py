"""What a plan says of memory, beside what small runs allocate: equal to the byte where it is counted from the code."""

import pytest
from planned import BATCH, elements, job_of, kept, local, loss, model_of, sizes, stepped, whole
from ranks import run

from fasttrain.dist.layout import FlatLayout
from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Zero, shard
from fasttrain.plan import kept as planned
from fasttrain.plan import states, tensors, traffic
from fasttrain.plan.job import Way
from fasttrain.plan.states import Kept
from fasttrain.train.dry import states_bytes


@pytest.mark.parametrize("model, precision, how", [
    (sizes(), "fp32", "none"), (sizes(2, True, True, 3), "fp32", "none"), (sizes(1, True), "bf16", "none"),
    (sizes(2, False, True, 2), "bf16-pure", "none"), (sizes(2, True), "bf16-pure", "none"),
    (sizes(2, False, False, 2), "fp32", "full"), (sizes(2, True), "bf16", "full"),
    (sizes(ngrams=2), "bf16-pure", "full")])
def test_activations_of_the_main_jobs_model(model, precision, how):
    job, way = job_of(model, precision), Way(recompute=how)
    bytes_kept, _ = kept(*model_of(model, precision, how))
    assert bytes_kept == sum(planned.of_stage(whole(job), job, way))


@pytest.mark.parametrize("model, precision, storage", [
    (sizes(2, True, True, 3), "fp32", "plain"), (sizes(), "bf16-pure", "plain"),
    (sizes(ngrams=2), "bf16-pure", "split"),
    (sizes(ngrams=2), "bf16-pure", "mixed"), (sizes(2, True, True, 2), "bf16-pure", "8-byte"),
    (sizes(ngrams=3), "bf16-pure", "5-byte")])
def test_weights_gradients_and_states(model, precision, storage):
    made, _ = model_of(model, precision)
    with stepped(made, **({} if storage == "plain" else {"storage": storage})) as optimizer:
        job = job_of(model, precision, storage)
        said = states.kept(whole(job), job, Way())
        assert said.weights == sum(p.nbytes for p in made.parameters())
        assert said.gradients == sum(p.grad.nbytes for p in made.parameters())
        assert said.states == states_bytes(optimizer)
        assert elements(made) == tensors.count(job.shape)


CAP = int(0.02 * 2**20)  # bytes of a bucket
CONTROL = 96  # bytes of the small gather that ends a step of two ranks (fasttrain.dist.control)


def divided(wire, model, storage, zero):
    made, _ = model_of(model, "bf16-pure")
    parallel = DataParallel(made, mesh=wire, bucket_cap_mb=CAP / 2**20)
    options = dict(lr=1e-3, storage=storage)
    optimizer = Zero(parallel, AdamW, stage=zero, **options) if zero else AdamW(made.parameters(), **options)
    reducer = parallel.reducer
    before = reducer.wire.bytes.copy()
    sum(p.float().sum() for p in made.parameters()).backward()
    memories = {bucket.data.untyped_storage().data_ptr(): bucket.data.untyped_storage().nbytes()
                for bucket in reducer.buckets}
    if zero == 2:
        memories |= {own.data_ptr(): own.nbytes for own in optimizer.method.own}
    optimizer.step()
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in made.parameters()}
    return (Kept(sum(weights.values()), sum(memories.values()), states_bytes(optimizer)),
            reducer.layout.to_json(), (reducer.wire.bytes - before).total())


@pytest.mark.parametrize("storage, zero", [("split", 0), ("8-byte", 1), ("split", 2)])
def test_ranks_that_average_gradients(storage, zero):
    model = sizes(2, True, True, 2)
    job = job_of(model, "bf16-pure", storage, batch=8, bucket_bytes=CAP, first_bucket_bytes=CAP)
    way, here = Way(data=2, zero=zero), whole(job)
    (first, layout, sent), (second, _, _) = run(divided, 2, model, storage, zero)
    assert first == states.kept(here, job, way)
    assert second.states <= first.states  # which has no padding at its end
    ours = states.buckets(here, job, way.terms)
    assert ours.buckets == FlatLayout.from_json(layout).buckets
    link, = traffic.links(here, job, way, 8)
    assert sent == link.sent + CONTROL


def sharded(wire, model):
    made, precision = model_of(model, "bf16-pure")
    parallel = shard(made, init_sync=False)
    optimizer = AdamW(made.parameters(), lr=1e-3, storage="split")
    loss(made, precision).backward()
    grads = sum(local(p.grad).nbytes for p in made.parameters())
    optimizer.step()
    held = Kept(sum(local(p.detach()).nbytes for p in made.parameters()), grads, states_bytes(optimizer))
    return held, parallel.bytes_per_step(2, 2, micro_batches=3)


def test_ranks_that_divide_parameters():
    model = sizes(2, True, False, 2)
    job = job_of(model, "bf16-pure", "split", batch=2 * 3 * BATCH)
    way, here = Way(shard=2, zero=3), whole(job)
    said = states.kept(here, job, way)
    (first, sent), _ = run(sharded, 2, model)
    assert first == said._replace(gathered=0)
    link, = traffic.links(here, job, way, 8)
    assert (link.axis, link.sent) == ("shard", sent)
    blocks = sum(p.numel() for p in model_of(model)[0].blocks[0].parameters())
    assert said.gathered == blocks * (2 * job.param + job.grad)  # two of them, and the gradient of one
