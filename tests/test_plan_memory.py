"""What a plan says of memory, beside what small runs allocate: equal to the byte where it is counted from the code."""

import pytest
from planned import elements, job_of, kept, model_of, sizes, stepped, whole
from ranks import run

from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Zero
from fasttrain.plan import kept as planned
from fasttrain.plan import states, tensors
from fasttrain.plan.job import Way
from fasttrain.train.dry import states_bytes


@pytest.mark.parametrize("model, precision, how", [
    (sizes(), "fp32", "none"), (sizes(2, True, True, 3), "fp32", "none"), (sizes(1, True), "bf16", "none"),
    (sizes(2, False, True, 2), "bf16-pure", "none"), (sizes(2, True), "bf16-pure", "none"),
    (sizes(2, False, False, 2), "fp32", "full"), (sizes(2, True), "bf16", "full"), (sizes(ngrams=2), "bf16-pure", "full")])
def test_activations_of_the_main_jobs_model(model, precision, how):
    job, way = job_of(model, precision), Way(recompute=how)
    bytes_kept, _ = kept(*model_of(model, precision, how))
    assert bytes_kept == sum(planned.of_stage(whole(job), job, way))


@pytest.mark.parametrize("model, precision, storage", [
    (sizes(2, True, True, 3), "fp32", "plain"), (sizes(), "bf16-pure", "plain"), (sizes(ngrams=2), "bf16-pure", "split"),
    (sizes(ngrams=2), "bf16-pure", "mixed"), (sizes(2, True, True, 2), "bf16-pure", "8-byte"),
    (sizes(ngrams=3), "bf16-pure", "5-byte")])
def test_weights_gradients_and_states(model, precision, storage):
    made, chosen = model_of(model, precision)
    with stepped(made, **({} if storage == "plain" else {"storage": storage})) as optimizer:
        job = job_of(model, precision, storage)
        said = states.kept(whole(job), job, Way())
        assert said.weights == sum(p.nbytes for p in made.parameters())
        assert said.gradients == sum(p.grad.nbytes for p in made.parameters())
        assert said.states == states_bytes(optimizer)
        assert elements(made) == tensors.count(job.shape)


def divided(wire, model, storage, zero):
    made, _ = model_of(model, "bf16-pure")
    parallel = DataParallel(made, wire, bucket_bytes=20_000, first_bucket_bytes=5_000)
    options = dict(lr=1e-3, storage=storage)
    optimizer = Zero(parallel, AdamW, stage=zero, **options) if zero else AdamW(made.parameters(), **options)
    before = wire.bytes.copy()
    for p in made.parameters():
        p.sum().backward() if False else None
    sum(p.float().sum() for p in made.parameters()).backward()
    sent = wire.bytes - before
    optimizer.step()
    sent = wire.bytes - before
    reducer = parallel.reducer
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in made.parameters()}
    buckets = {bucket.data.untyped_storage().data_ptr(): bucket.data.untyped_storage().nbytes()
               for bucket in reducer.buckets}
    return (sum(weights.values()), sum(buckets.values()), states_bytes(optimizer),
            sum(bucket.bytes for bucket in reducer.layout.buckets), dict(sent))


@pytest.mark.parametrize("storage, zero", [("split", 0), ("8-byte", 1), ("split", 2)])
def test_ranks_that_average_gradients(storage, zero):
    model = sizes(2, True, True, 2)
    job = job_of(model, "bf16-pure", storage, batch=8, bucket_bytes=20_000, first_bucket_bytes=5_000)
    way = Way(data=2, zero=zero)
    said = states.kept(whole(job), job, way)
    answers = run(divided, 2, model, storage, zero)
    weights, memories, held, buckets, sent = answers[0]
    print(said, answers)
    assert weights == said.weights
    assert held == said.states
    assert states.buckets(whole(job), job, 2).buckets and buckets == sum(
        bucket.bytes for bucket in states.buckets(whole(job), job, 2).buckets)
    assert 0
