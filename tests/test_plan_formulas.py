"""Formulas of a plan beside the papers', torch's own orders of pipelines, and models that others have written."""

import itertools

import pytest
import torch
from torch.distributed.pipelining import schedules as torchs

from fasttrain.dist import accounting
from fasttrain.parallel.pipeline.costs import counted
from fasttrain.parallel.pipeline.cuts import cut
from fasttrain.plan import bubbles, kept, places, shapes, states, tensors, traffic
from fasttrain.plan.job import AXES, Job, Way
from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.making import flops_of_step
from fasttrain.train.model import GPT

OPERATIONS = torchs._ComputationType
COUNTS = {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496,
          "llama-3-405b": 405_853_388_800, "mixtral-8x7b": 46_702_792_704}  # as their publishers' files hold


@pytest.mark.parametrize("name, count", COUNTS.items())
def test_published_models_have_as_many_parameters_as_published(name, count):
    assert tensors.count(shapes.named(name)) == count


def test_configurations_of_transformers_give_their_models_sizes(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=100)
    configs = [
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, vocab_size=100),
        transformers.LlamaConfig(**sizes), transformers.LlamaConfig(**sizes, tie_word_embeddings=True, head_dim=32),
        transformers.MistralConfig(**sizes), transformers.MixtralConfig(**sizes, num_local_experts=4)]
    for config in configs:
        config.save_pretrained(tmp_path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert tensors.count(shapes.named(str(tmp_path))) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tensor, sequence", [(1, False), (4, False), (4, True)])
def test_activations_of_a_layer_are_those_of_korthikanti(tensor, sequence):
    """Equations 1, 2 and 4: 34 + 5 a s / h bytes of each feature, divided as they say."""
    shape = shapes.named("gpt2-xl")
    shape = shapes.Shape("a GPT", "gpt2", 4, 1024, 16, 16, 64, 4096, 1000, dropout=True, source=shape.source)
    job = Job(shape, 512, 8, micro_batch=2, flash=False)
    way = Way(tensor=tensor, sequence=sequence)
    assert kept.of_block(job, way, regather=True) == kept.formula(shape, 512, 2, tensor, sequence)
    s, b, h, a = 512, 2, 1024, 16
    assert kept.of_block(job, Way(recompute="full")) == 2 * s * b * h  # section 5, the input of each layer
    assert kept.of_block(Job(shape, 512, 8, micro_batch=2), way, regather=True) == pytest.approx(
        kept.formula(shape, 512, 2, tensor, sequence) - s * b * (5 * a * s - 4 * a) / tensor)  # without the products


@pytest.mark.parametrize("options", [dict(), dict(layers=2, width=64, heads=2, ngrams=1, sequence=32, batch=4)])
def test_operations_are_those_that_are_counted(options):
    config = TrainConfig(**{**options, "processes": 1})
    shape = shapes.ours(config.layers, config.width, config.heads, ngrams=config.ngrams, rows=config.rows)
    one = tensors.forward_flops(shape, tensors.parts(shape), config.sequence)
    assert 3 * one * config.batch * config.sequence == flops_of_step(config)


def test_operations_are_those_of_narayanan():
    """Equation 3 without what is recomputed: 72 B s l h^2 (1 + s / 6h + V / 12 l h) in a step."""
    shape, s = shapes.named("gpt2-xl"), 1024
    l, h, V = shape.layers, shape.width, shape.vocabulary
    assert 3 * tensors.forward_flops(shape, tensors.parts(shape), s) == pytest.approx(
        72 * l * h**2 * (1 + s / (6 * h) + V / (12 * l * h)), rel=1e-12)


@pytest.mark.parametrize("options", [dict(tied=True, ngrams=3, rows=50), dict(kv_heads=1, gated=True), dict(experts=4)])
def test_parameters_are_those_of_the_main_jobs_model(options):
    with torch.device("meta"):
        model = GPT(3, 64, 4, 16, **options)
    shape = shapes.ours(3, 64, 4, **options)
    held = [held for part in tensors.parts(shape) for held in tensors.of_part(shape, part)]
    names = {one.name: one.shape for one in held if not (shape.tied and one.name == "head.weight")}
    assert list(names.items()) == [(name, tuple(p.shape)) for name, p in model.named_parameters()]


@pytest.mark.parametrize("vocabulary, stages", [(256, 2), (256, 3), (5000, 4), (5000, 8)])
def test_pipelines_are_cut_where_the_pipeline_cuts(vocabulary, stages):
    with torch.device("meta"):
        model, sample = GPT(10, 64, 4, 16, vocabulary=vocabulary), torch.zeros(1, 16, dtype=torch.long)
    shape = shapes.ours(10, 64, 4, vocabulary=vocabulary)
    ours = [len(mine) for mine in tensors.stages(shape, 16, stages)]
    assert ours == cut(counted(model, sample), stages)


# --- Pipelines --------------------------------------------------------------------------------------------------------

def order_of(schedule, p, m, v):
    """Each rank's operations, as torch's class lists them; of 1F1B, whose list torch only draws, the paper's."""
    if schedule == "1f1b":
        order = {}
        for rank in range(p):
            warm = min(m, p - 1 - rank)
            pairs = [(OPERATIONS.FORWARD, warm + n) if even else (OPERATIONS.FULL_BACKWARD, n)
                     for n in range(m) for even in (True, False) if not even or warm + n < m]
            steps = [(OPERATIONS.FORWARD, n) for n in range(warm)] + pairs
            order[rank] = [torchs._Action(rank, kind, number) for kind, number in steps]
        return order
    kind = {"gpipe": torchs.ScheduleGPipe, "interleaved": torchs.ScheduleInterleaved1F1B,
            "zero-bubble": torchs.ScheduleInterleavedZeroBubble, "zbv": torchs.ScheduleZBVZeroBubble}[schedule]
    made = kind.__new__(kind)  # without stages, which need processes
    made.pp_group_size, made._n_microbatches, made.n_local_stages = p, m, v
    made._num_stages = made.num_stages = p * v
    made.number_of_rounds = max(1, m // p)
    made.microbatches_per_round = m // made.number_of_rounds
    if schedule == "gpipe":
        return made._get_pipeline_order()
    return {rank: made._calculate_single_rank_operations(rank) for rank in range(p)}


def played(order, stages, forward, inputs, weights):
    """The time of a step, and of how many stages' micro-batches each rank keeps activations at most."""
    last = stages - 1
    takes = {OPERATIONS.FORWARD: forward, OPERATIONS.BACKWARD_INPUT: inputs, OPERATIONS.BACKWARD_WEIGHT: weights,
             OPERATIONS.FULL_BACKWARD: inputs + weights}
    todo = {rank: [one for one in ops if one is not None and one.computation_type in takes]
            for rank, ops in order.items()}
    ended, clock, live, most = {}, dict.fromkeys(todo, 0.0), dict.fromkeys(todo, 0), dict.fromkeys(todo, 0)
    while any(todo.values()):
        before = sum(map(len, todo.values()))
        for rank, ops in todo.items():
            while ops:
                stage, kind, number = ops[0].stage_index, ops[0].computation_type, ops[0].microbatch_index
                needs = None
                if kind == OPERATIONS.FORWARD and stage:
                    needs = "forward", stage - 1, number
                elif kind in (OPERATIONS.BACKWARD_INPUT, OPERATIONS.FULL_BACKWARD):
                    needs = ("backward", stage + 1, number) if stage < last else ("forward", stage, number)
                if needs is not None and needs not in ended:
                    break
                clock[rank] = max(clock[rank], ended.get(needs, 0.0)) + takes[kind]
                if kind == OPERATIONS.FORWARD:
                    live[rank] += 1
                    most[rank] = max(most[rank], live[rank])
                if kind in (OPERATIONS.BACKWARD_WEIGHT, OPERATIONS.FULL_BACKWARD):
                    live[rank] -= 1
                if kind != OPERATIONS.BACKWARD_WEIGHT:
                    ended["forward" if kind == OPERATIONS.FORWARD else "backward", stage, number] = clock[rank]
                ops.pop(0)
        assert sum(map(len, todo.values())) < before, "the order waits for itself"
    return max(clock.values()), most


@pytest.mark.parametrize("schedule, v", [(name, v) for name, several in bubbles.SCHEDULES.items() for v in several])
@pytest.mark.parametrize("p, m", [(2, 4), (4, 8), (4, 12), (8, 16)])
@pytest.mark.parametrize("forward, inputs, weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 0.5)])
def test_bubbles_and_live_activations_are_those_of_torchs_orders(schedule, v, p, m, forward, inputs, weights):
    assert bubbles.problem(schedule, p, m) is None
    lasted, most = played(order_of(schedule, p, m, v), p * v, forward / v, inputs / v, weights / v)
    work = m * (forward + inputs + weights)
    assert lasted - work == pytest.approx(bubbles.idle(schedule, p, v, forward, inputs, weights))
    assert bubbles.fraction(schedule, p, m, v, forward, inputs, weights) == pytest.approx(1 - work / lasted)
    for rank in range(p):
        assert most[rank] / v == bubbles.live(schedule, p, rank, m, v)


def test_known_bubbles():
    assert bubbles.fraction("gpipe", 4, 8) == bubbles.fraction("1f1b", 4, 8) == 3 / 11  # (p - 1) / (m + p - 1)
    idle_over_ideal = bubbles.idle("interleaved", 4, 2) / (8 * 3)
    assert idle_over_ideal == 3 / (2 * 8)  # (p - 1) / (v m)
    assert bubbles.idle("zero-bubble", 4) == bubbles.idle("1f1b", 4) / 3  # ZB1P: a third
    for schedule, m in (("1f1b", 3), ("interleaved", 6), ("zero-bubble", 2), ("zbv", 6)):
        assert bubbles.problem(schedule, 4, m if schedule != "interleaved" else 9)


# --- Links ------------------------------------------------------------------------------------------------------------

def test_groups_are_those_of_the_mesh():
    sizes = dict(zip(AXES, (2, 3, 1, 2, 1, 2), strict=True))
    numbered = list(itertools.product(*(range(size) for size in sizes.values())))
    for axes in (("tensor",), ("data", "expert"), ("pipeline",), AXES):
        by_hand = [rank for rank, where in enumerate(numbered)
                   if all(place == 0 for axis, place in zip(AXES, where, strict=True) if axis not in axes)]
        assert places.members(sizes, *axes) == tuple(by_hand)
    assert places.leaving((0, 1, 2, 3), 8) == 0
    assert places.leaving((0, 8), 8) == 1
    assert places.leaving((0,), 1) == places.apart((0,), 1) == 0


def links_of(job, way, rank=0):
    here = tensors.stage(job.shape, rank, way.pipeline, way.chunks, way.schedule == "zbv", way.tensor, way.expert)
    return {link.axis: link for link in traffic.links(here, job, way, 8)}


def test_bytes_on_links_are_those_of_the_formulas():
    shape = shapes.named("mixtral-8x7b")
    job, tokens = Job(shape, 4096, 64), 4096
    h, l = shape.width, shape.layers
    t = links_of(job, Way(data=8, tensor=8))["tensor"]
    ends = 7 / 8 * tokens * h * 2 * 2 + 7 / 8 * tokens * h * 2 * 2 + 7 * 20 * tokens
    assert t.sent == 8 * (l * 8 * 7 / 8 * tokens * h * 2 + ends)  # 8 (t - 1) / t b s h a layer, 8 micro-batches
    assert (t.across, t.spans) == (0, False)
    again = links_of(job, Way(data=8, tensor=8, sequence=True, recompute="full"))["tensor"]
    assert again.sent == 8 * (l * (8 + 3) * 7 / 8 * tokens * h * 2 + ends)  # all but the last of a block's four
    e = links_of(job, Way(data=8, expert=8))["expert"]
    assert e.sent == l * 4 * 7 / 8 * tokens * 2 * h * 2  # 4 (e - 1) / e tokens k h
    c = links_of(job, Way(data=16, context=4))["context"]
    assert c.sent == 4 * l * 2 * 2 * 3 / 4 * 4096 * 1024 * 2  # 2 (c - 1) / c b s h_kv each way
    for rank, ends in ((0, 1), (1, 2), (3, 1)):
        p = links_of(job, Way(data=8, pipeline=4), rank)["pipeline"]
        assert p.sent == 8 * ends * tokens * h * 2
        assert (p.across, p.spans) == (p.sent, True)
    v_shaped = links_of(job, Way(data=8, pipeline=4, schedule="zbv", chunks=2), 3)["pipeline"]
    assert v_shaped.sent == 8 * 2 * tokens * h * 2  # the last rank hands on to itself
    here = tensors.stage(shape, expert=8)
    experts = sum(one.numel for one in here.held if one.expert)
    both = links_of(job, Way(data=4, expert=8))
    layout = states.buckets(here, job, 32, 8)
    sent = {group: sum(bucket.elements for bucket in layout.buckets if bucket.group == group)
            for group in ("data", "expert")}
    assert both["data"].sent == accounting.bytes_per_step(0, sent["data"], 32, 2, 2)
    assert both["experts' data"].sent == accounting.bytes_per_step(0, sent["expert"], 4, 2, 2)
    assert sent["expert"] == experts


def test_what_no_shape_can_be():
    for message, change in (("share", dict(kv_heads=3)), ("at least 1", dict(layers=0)),
                            ("of 4 experts", dict(experts=4, top_k=5))):
        with pytest.raises(BadInput, match=message):
            shapes.Shape(**{**vars(shapes.named("llama-3-8b")), **change})
