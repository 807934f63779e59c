"""What scripts do around an optimizer of torch, with ours: each against the same script with torch's optimizer."""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from clients import F32, F64, OURS, PAIRS, Make, assert_close_run, batches, follow, model_of, named, squared_error
from helpers import assert_same_run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.utils import prune

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 8
Act = Callable[[int, nn.Module, torch.optim.Optimizer], None]


def train(make: Make, build: Callable[[], nn.Module] = model_of, before_backward: Act | None = None,
          before_step: Act | None = None) -> dict[str, Tensor]:
    model = build()
    optimizer = make(model.parameters())
    for i, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        if before_backward:
            before_backward(i, model, optimizer)
        squared_error(model, batch).backward()
        if before_step:
            before_step(i, model, optimizer)
        optimizer.step()
    return named(model, optimizer)


# --- Between backward and step ----------------------------------------------------------------------------------------

def clip_norm(_: int, model: nn.Module, __: Any) -> None:
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1


def clip_norm_in_two(_: int, model: nn.Module, __: Any) -> None:
    params = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], norm_type=float("inf"))
    nn.utils.clip_grads_with_norm_(params, 0.01, norm)


def clip_value(_: int, model: nn.Module, __: Any) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def replace_gradients(i: int, model: nn.Module, _: Any) -> None:
    for number, p in enumerate(model.parameters()):
        if i % 2 and number % 2:
            p.grad = torch.full_like(p, 0.25) if i % 3 else p.grad.t().contiguous().t()  # type: ignore[union-attr]


def write_gradients(i: int, model: nn.Module, _: Any) -> None:
    for p in model.parameters():
        p.grad.data.mul_(0.5).add_(p.detach(), alpha=0.01)  # type: ignore[union-attr]


def drop_gradients(i: int, model: nn.Module, _: Any) -> None:
    for number, p in enumerate(model.parameters()):
        if (i + number) % 3 == 0:
            p.grad = None


def meddle(i: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = 0.01 / (i + 1)
    group["weight_decay"] = 0.0 if i % 2 else 0.1  # another rule of ours


BEFORE_STEP: list[Act] = [clip_norm, clip_norm_in_two, clip_value, replace_gradients, write_gradients, drop_gradients,
                          meddle]


@pytest.mark.parametrize("act", BEFORE_STEP)
@pytest.mark.parametrize("name", PAIRS)
def test_between_backward_and_step(name: str, act: Act) -> None:
    assert_close_run(*(train(make, before_step=act) for make in PAIRS[name]))


# --- Between steps ----------------------------------------------------------------------------------------------------

def freeze(i: int, model: nn.Module, _: Any) -> None:
    """A layer rests for some steps; its weights must not decay meanwhile."""
    model[0].requires_grad_(not 2 <= i < 5)


def keep_zeros(i: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


def move_storage(i: int, model: nn.Module, _: Any) -> None:
    """Every parameter becomes a view of one new vector."""
    if i in (3, 4):
        vector = nn.utils.parameters_to_vector(model.parameters()).detach() * 0.75
        nn.utils.vector_to_parameters(vector, model.parameters())


def load_weights(i: int, model: nn.Module, _: Any) -> None:
    if i == 3:
        model.load_state_dict({key: value * 0.5 for key, value in model.state_dict().items()})


def new_data(i: int, model: nn.Module, _: Any) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def add_a_group(i: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A layer that is thawed later than the rest, at another rate."""
    if i == 0:
        last = optimizer.param_groups[0]["params"][-2:]
        del optimizer.param_groups[0]["params"][-2:]
        model.extra = last  # type: ignore[assignment]
    if i == 3:
        optimizer.add_param_group({"params": model.extra, "lr": 0.003})


def load_state(i: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if i == 4:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))


def forget_state(i: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if i == 4:
        optimizer.state.clear()
    if i == 6:
        optimizer.state.pop(model[0].weight)


def reset_moments(i: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if i == 4:
        for state in optimizer.state.values():
            for key, value in state.items():
                if key != "step":
                    state[key] = torch.zeros_like(value)


BETWEEN_STEPS: list[Act] = [freeze, keep_zeros, move_storage, load_weights, new_data, add_a_group, load_state,
                            forget_state, reset_moments]


@pytest.mark.parametrize("act", BETWEEN_STEPS)
@pytest.mark.parametrize("name", PAIRS)
def test_between_steps(name: str, act: Act) -> None:
    assert_close_run(*(train(make, before_backward=act) for make in PAIRS[name]))


# --- Models whose parameters are not plain weights --------------------------------------------------------------------

def weight_normed() -> nn.Module:
    model = model_of()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def orthogonal() -> nn.Module:
    torch.manual_seed(1)
    model = model_of()
    nn.utils.parametrizations.orthogonal(model[3], orthogonal_map="cayley")
    return model


def spectral_normed() -> nn.Module:
    torch.manual_seed(1)
    model = model_of()
    nn.utils.parametrizations.spectral_norm(model[3])
    return model


def pruned() -> nn.Module:
    model = model_of()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def channels_last() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 4, (2, 1)), nn.Flatten(), nn.Linear(8, 3))
    return model.to(F64, memory_format=torch.channels_last)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).to(F64)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=F64) + i).view_as(p))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("build", [weight_normed, orthogonal, spectral_normed, pruned, channels_last, tied])
@pytest.mark.parametrize("name", PAIRS)
def test_models(name: str, build: Callable[[], nn.Module]) -> None:
    assert_close_run(*(train(make, build) for make in PAIRS[name]))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_model_that_is_converted_before_its_first_step(name: str, to: torch.dtype, swapped: bool) -> None:
    """States are made by the first step, in the dtype that the parameter then has; as in torch."""
    dtypes = []
    for make in PAIRS[name]:
        model = model_of(F32)
        optimizer = make(model.parameters())
        torch.__future__.set_swap_module_params_on_conversion(swapped)
        try:
            model.to(to)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        # 16 bits: one rounding at the store, half a unit, and what fp32 adds before it (tests/test_witness.py).
        steps = follow(optimizer, PAIRS[name][1], 0.51 if to != F64 else 4.0) if make is OURS[name] else []
        for batch in batches(STEPS, to):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
        assert steps == [6] * STEPS or make is not OURS[name]
        dtypes.append({key: value.dtype for key, value in named(model, optimizer).items()})
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_model_that_is_converted_in_mid_training(name: str, to: torch.dtype) -> None:
    """Its states stay in fp32, and every step is right. torch's AdamW raises here, of dtypes that differ."""
    model = model_of(F32)
    optimizer = OURS[name](model.parameters())
    steps: list[int] = []
    for i, batch in enumerate(batches(STEPS, F32)):
        if i == STEPS // 2:
            model.to(to)
            steps = follow(optimizer, PAIRS[name][1], 0.51 if to != F64 else 4.0)
        optimizer.zero_grad()
        squared_error(model, tuple(x.to(model[0].weight.dtype) for x in batch)).backward()
        optimizer.step()
    assert steps == [6] * (STEPS // 2)
    states = [value.dtype for key, value in named(model, optimizer).items() if ": " in key]
    assert set(states) == {F32}


# --- Records and hooks ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PAIRS)
def test_the_profiler_sees_steps_by_name(name: str) -> None:
    model = model_of()
    optimizer = OURS[name](model.parameters())
    squared_error(model, batches(1)[0]).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    seen = {event.key: event.count for event in profile.key_averages()}
    assert seen[f"Optimizer.step#{name}.step"] == 1
    assert seen[f"Optimizer.zero_grad#{name}.zero_grad"] == 1


def test_a_hook_may_change_the_step() -> None:
    """A hook that runs before a step writes gradients, one that runs after writes weights."""
    def negate(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad.neg_()

    def clamp(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.data.clamp_(-0.5, 0.5)

    ends = []
    for make in PAIRS["AdamW"]:
        model = model_of()
        optimizer = make(model.parameters())
        optimizer.register_step_pre_hook(negate)
        optimizer.register_step_post_hook(clamp)
        for batch in batches(STEPS):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
        ends.append(named(model, optimizer))
    assert_close_run(*ends)
    assert ends[0]["0.weight"].abs().max() == 0.5


# --- torch.distributed, one process -----------------------------------------------------------------------------------

@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for batch in batches(STEPS)[first:last]:
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", PAIRS)
def test_distributed_checkpoints(name: str, flat: bool, tmp_path: Path) -> None:
    """Saved and loaded by torch.distributed.checkpoint: the run goes on as if nothing had happened."""
    straight = model_of()
    wanted = OURS[name](straight.parameters())
    steps_of(straight, wanted, 0, STEPS)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = model_of()
    optimizer = OURS[name](model.parameters())
    steps_of(model, optimizer, 0, 4)
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)

    model = model_of()
    nn.init.zeros_(model[0].weight)
    optimizer = OURS[name](model.parameters(), lr=123.0)
    weights, states = get_state_dict(model, optimizer, options=options)  # takes a step with a rate of 0 to make states
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=options)
    steps_of(model, optimizer, 4, STEPS)
    assert_same_run(named(model, optimizer), named(straight, wanted), name)


@pytest.mark.parametrize("kinds", [(0, 1), (1, 0)], ids=["ours to torch", "torch to ours"])
@pytest.mark.parametrize("name", PAIRS)
def test_states_by_name_go_both_ways(name: str, kinds: tuple[int, int]) -> None:
    """`get_optimizer_state_dict` keeps states by parameter name."""
    first, second = (model_of() for _ in kinds)
    giving, taking = (PAIRS[name][kind](model.parameters()) for kind, model in zip(kinds, (first, second), strict=True))
    steps_of(first, giving, 0, 4)
    before = named(second, taking)
    states = copy.deepcopy(get_optimizer_state_dict(first, giving))
    set_optimizer_state_dict(second, taking, states)
    assert_same_run({k: v for k, v in named(second, taking).items() if ": " not in k}, before, "weights")
    got, wanted = named(second, taking), named(first, giving)
    assert_same_run({k: got[k] for k in got if ": " in k}, {k: wanted[k] for k in wanted if ": " in k}, "states")


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own import
@pytest.mark.parametrize("name", PAIRS)
def test_zero_redundancy_optimizer(name: str) -> None:
    """torch's ZeroRedundancyOptimizer makes the optimizer from its class."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    ends = []
    for make in PAIRS[name]:
        model = model_of()
        optimizer = ZeroRedundancyOptimizer(model.parameters(), make.func, **make.keywords)  # type: ignore[attr-defined]
        steps_of(model, optimizer, 0, STEPS)
        ends.append(named(model, optimizer.optim))
    assert_close_run(*ends)
