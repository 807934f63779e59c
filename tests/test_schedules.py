"""Schedules: pure functions of the step. Values against torch, transformers and optax are in test_schedule_peers.py."""

import copy
import itertools
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain import schedules as s
from fasttrain.schedules.text import KNOWN

EXAMPLES = [
    s.constant(0.5), s.constant(2.0, 7), s.warmup(5), s.warmup(5, start=0.1, shape="cosine"), s.warmup(5, shape="sqrt"),
    s.linear(9, 0.2, 1.5), s.cosine(12, 0.1), s.cosine(12, cycles=3), s.restarts(3, 2, 0.1, 0.7), s.polynomial(9, 2.0),
    s.inverse_sqrt(4), s.exponential(0.9, 3, True, 0.5), s.step_decay(4, 0.3), s.multi_step((2, 7), (0.5, 3.0)),
    s.points((0, 4, 9), (0.0, 1.0, 0.5), "cosine"), s.decay(6, 0.1, "sqrt"), s.cyclic(3, 5, shape="triangular2"),
    s.one_cycle(20, three_phases=True), s.warmup_cosine(30, 4, 0.1), s.warmup_stable_decay(30, 4, 9),
    s.first(9, s.inverse_sqrt(3)), s.rounded(s.linear(10, 8, 64), 8),
    s.first(8, s.warmup(3) * s.inverse_sqrt(5)) + s.constant(0.1),
    -0.5 * (s.warmup(2) + s.cosine(5)) * s.step_decay(3),
]


def old_warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """As the main job had it before schedules were objects: its learning rates are to stay, to the bit."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@pytest.mark.parametrize("steps, warmup", [(1000, 50), (300, 100), (12, 3), (1, 0), (1, 1), (5, 5), (7, 0)])
def test_the_main_job_keeps_its_bits(steps, warmup):
    schedule = s.warmup_cosine(steps, warmup)
    assert [schedule(t) for t in range(steps)] == [old_warmup_cosine(t, steps, warmup) for t in range(steps)]


def test_shape():
    values = [s.warmup_cosine(100, warmup=10)(t) for t in range(100)]
    assert values[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert 0 < values[99] < 0.001


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_text_pickle_and_copy_give_the_same_schedule(schedule):
    for other in (s.parse(repr(schedule)), pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert other == schedule
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
        assert [other(t) for t in range(40)] == [schedule(t) for t in range(40)]


@pytest.mark.parametrize("schedule", [one for one in EXAMPLES if one.length is not None], ids=repr)
def test_it_stands_still_past_its_length(schedule):
    assert len({schedule(t) for t in range(schedule.length, schedule.length + 50)}) == 1
    with pytest.raises(ValueError, match="no value at step -1"):
        schedule(-1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 60))
def test_joined_is_the_piece_of_that_step(lengths, step):
    pieces = [s.linear(length, float(i), i + 0.5) for i, length in enumerate(lengths)]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    begin = 0
    for piece, length in zip(pieces, lengths, strict=True):
        if step < begin + length or piece is pieces[-1]:
            assert whole(step) == piece(step - begin)
            break
        begin += length
    assert whole.length == sum(lengths)


def test_join_is_associative_and_products_are_products():
    a, b, c = s.warmup(3), s.cosine(5), s.constant(0.1)
    assert (a + b) + c == a + (b + c)
    for t in range(12):
        assert (2 * a)(t) == (a * 2)(t) == 2 * a(t)
        assert (a * b)(t) == a(t) * b(t)
    assert (a * b).length == 5
    assert (s.inverse_sqrt(3) * b).length is None
    assert (a * s.inverse_sqrt(3)).warmup_steps == 3


@pytest.mark.parametrize("shape, middle", [("linear", 0.55), ("cosine", 0.55), ("sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))])
def test_warmup_stable_decay(shape, middle):
    schedule = s.warmup_stable_decay(100, warmup=10, decay_steps=20, floor=0.1, shape=shape)
    assert schedule.length == 100
    assert {schedule(t) for t in range(9, 81)} == {1.0}
    assert schedule(90) == pytest.approx(middle)
    assert schedule(100) == pytest.approx(0.1)
    assert s.warmup_stable_decay(30, warmup=10, decay_steps=20)(10) == 1.0


def test_a_batch_size_is_whole_multiples():
    batch = s.rounded(s.linear(100, start=1, end=100), 16)
    values = [batch(t) for t in range(101)]
    assert all(isinstance(value, int) and value % 16 == 0 for value in values)
    assert values[0] == 16
    assert values[-1] == 96
    assert all(abs(value - (1 + 0.99 * t)) <= 16 for t, value in enumerate(values))


@pytest.mark.parametrize("make, message", [
    (lambda: s.warmup_cosine(10, warmup=11), "a run of 10 steps is shorter than its warmup of 11"),
    (lambda: s.warmup_stable_decay(10, warmup=5, decay_steps=6), "shorter than its warmup of 5 and its decay of 6"),
    (lambda: (s.warmup(100) + s.cosine(10)).check(50), "a run of 50 steps ends in the warmup of 100"),
    (lambda: s.first(5, s.warmup(6) + s.cosine(10)), "a run of 5 steps ends in the warmup of 6"),
    (lambda: s.inverse_sqrt(10) + s.cosine(10), "no end, so that nothing can follow it.*first"),
    (lambda: s.cosine(0), r"cosine: steps=0 must be a whole number of at least 1"),
    (lambda: s.cosine(10.0), r"cosine: steps=10.0 must be a whole number"),
    (lambda: s.cosine(True), r"cosine: steps=True"),
    (lambda: s.cosine(10, floor=math.nan), "floor=nan must be a finite number"),
    (lambda: s.exponential(0.0), "rate=0.0 must be positive"),
    (lambda: s.decay(10, shape="square"), "shape='square' is none of 'linear', 'cosine', 'sqrt'"),
    (lambda: s.multi_step((7, 3)), "must rise"),
    (lambda: s.multi_step((3, 7), (0.1,)), "1 factors for 2 milestones"),
    (lambda: s.points((1, 3), (0.0, 1.0)), "must rise from 0"),
    (lambda: s.points((0, 3), (0.0,)), "1 values for 2 steps"),
    (lambda: s.one_cycle(5, rise=0.1), "leaves a phase without steps"),
    (lambda: s.one_cycle(100, rise=0.6, three_phases=True), "leaves a phase without steps"),
    (lambda: math.inf * s.cosine(5), "left=inf must be a finite number"),
    (lambda: s.rounded(s.cosine(5), 0), "multiple=0"),
    (lambda: s.Plateau(factor=1.0), "factor=1.0 must be between 0 and 1"),
    (lambda: s.Plateau(mode="lowest"), "mode='lowest' is none of"),
])
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("given", ["cosine", None, [1.0]])
def test_what_is_no_schedule(given):
    with pytest.raises(TypeError, match="is no schedule"):
        s.as_schedule(given)
    with pytest.raises(TypeError):
        s.cosine(5) + given


# --- Text -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    ("warmup(100) + cosinus(1000)", r"'cosinus\(1000\)': there is no schedule cosinus; there are constant"),
    ("__import__('os').system('false')", "neither a schedule nor a number"),
    ("cosine(10).__class__", "neither a schedule nor a number"),
    ("cosine(steps)", "'steps' is neither a schedule nor a number"),
    ("[x for x in (1,)]", "neither a schedule nor a number"),
    ("cosine(10, *(1, 2))", "neither a schedule nor a number"),
    ("cosine(10, **{})", "without \\*\\*"),
    ("cosine(10, peak=2)", "unexpected keyword argument 'peak'"),
    ("cosine()", "missing 1 required"),
    ("cosine(0)", "steps=0 must be"),
    ("9**999999999 * cosine(4)", "neither a schedule nor a number"),
    ("2 * 3 * cosine(4)", r"'2 \* 3': numbers are not computed with"),
    ("cosine(4) + 0.5", r"constant\(...\) for a number"),
    ("'a' * cosine(4)", "only schedules and numbers"),
    ("first(10, 5)", "a schedule is missing"),
    ("0.5", "but the value 0.5"),
    ("cosine(10", "is no schedule: .* at character"),
    ("1if 1else 2", "is no schedule: invalid decimal literal"),
    ("", "is no schedule"),
    ("(" * 3000, "is no schedule|too deeply"),
    ("-" * 3999 + "1", "neither a schedule|too deeply"),
    ("1" * 5000, "at most 4000"),
])
def test_texts_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        s.parse(text)


@given(st.text(max_size=40) | st.text("cosine(1,) +*.0warmup=flr-", max_size=40))
def test_any_text_is_a_schedule_or_one_error(text):
    try:
        schedule = s.parse(text)
    except ValueError:
        return
    assert s.parse(repr(schedule)) == schedule


def test_every_function_of_the_package_can_be_written():
    names = set(s.__all__) - {"Schedule", "Scheduler", "Plateau", "parse", "as_schedule", "function"}
    assert names == set(KNOWN)
