"""Muon is torch.optim.Muon for matrices, that for each matrix of a batch, and AdamW for the rest."""

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, generator, normal
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import AdamW, Muon
from fasttrain.optim.newton_schulz import orthogonalize
from fasttrain.optim.workspace import Workspace

SHAPES = ((24, 40), (24, 40), (40, 24), (16, 16), (2, 9))
ONE_ROW = (1, 9)  # a product of vectors, which torch sums in another order in a batch
OPTIONS: list[dict[str, Any]] = [
    {}, dict(lr=0.01), dict(weight_decay=0.2), dict(momentum=0.8), dict(ns_steps=6), dict(nesterov=False),
    dict(ns_coefficients=(3.4, -4.7, 2.0)), dict(adjust_lr_fn="original"), dict(lr=torch.tensor(0.02)),
    dict(adjust_lr_fn="match_rms_adamw", weight_decay=0.0), dict(eps=10.0, momentum=0.0)]


def frobenius(x: Tensor) -> float:
    return x.double().norm().item()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_torchs(options: dict[str, Any], backend: str) -> None:
    """Both round the update to bf16 and multiply in bf16. Where a rounding of the momentum (1e-16 apart) falls on the
    other side of a bf16 tie the two part, which these seeds do not meet: the products have the same bits.
    """
    numbers = generator(1)
    mine = [Parameter(normal(shape, torch.float64, numbers)) for shape in SHAPES]
    theirs = copy.deepcopy(mine)
    options = copy.deepcopy(options)
    if isinstance(options.get("lr"), Tensor):
        options["lr"] = options["lr"].double()
    ours, torchs = Muon(mine, **options, backend=backend), torch.optim.Muon(theirs, **options)
    for seed in range(5):
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            p.grad = None if (i + seed) % 5 == 4 else normal(p.shape, torch.float64, numbers)
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        torchs.step()
    for p, q in zip(mine, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)
        assert ours.state[p].keys() == torchs.state[q].keys()
        buffers = (optimizer.state[x]["momentum_buffer"] for optimizer, x in ((ours, p), (torchs, q)))
        assert torch.allclose(*buffers, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_step_is_near_torchs(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """From the same state. fp32: momenta are a few ulp apart, so some elements round to another bf16 number, 2^-8 away,
    and the steepest part of the polynomials, 3.4445 a step, spreads that over small singular values: 3% of the update
    in the Frobenius norm (1% was seen). 16 bits: torch rounds momentum and update to 16 bits on the way, twice more.
    """
    if dtype == torch.bfloat16 and options.get("nesterov") is False:
        pytest.skip("torch normalises in place there, and so divides its momentum by its norm")
    numbers = generator(2)
    mine = [Parameter(normal(shape, dtype, numbers)) for shape in (*SHAPES, ONE_ROW)]
    ours = Muon(mine, **{"lr": 0.02, **options}, backend=backend)
    for _ in range(3):
        for p in mine:
            p.grad = normal(p.shape, dtype, numbers)
        theirs = [Parameter(p.detach().clone()) for p in mine]
        torchs = torch.optim.Muon(theirs, **{"lr": 0.02, **options})
        torchs.load_state_dict(copy.deepcopy({**torchs.state_dict(), "state": ours.state_dict()["state"]}))
        before = [p.detach().clone() for p in mine]
        for p, q in zip(mine, theirs, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        torchs.step()
        for p, q, old in zip(mine, theirs, before, strict=True):
            # p is rounded twice by torch and once by us: a unit of p for each element, in 16 bits more than the update
            rounding = frobenius(p.detach()) * torch.finfo(dtype).eps
            bound = 0.03 if dtype == torch.float32 else 0.06
            assert frobenius(p.detach() - q.detach()) <= bound * frobenius(q.detach() - old) + rounding


def test_a_batch_is_its_matrices_one_by_one(backend: str) -> None:
    """Experts, heads and filters against torch's Muon on each matrix."""
    numbers = generator(3)
    sizes = ((3, 6, 10), (8, 3, 2, 2), (12, 10))
    experts, filters, attention = (normal(size, torch.float64, numbers) for size in sizes)
    pair = [(Parameter(experts), {}, list(experts), (6, 10)),
            (Parameter(filters), dict(flatten=True), [filters], (8, 12)),
            (Parameter(filters), dict(flatten=False), list(filters.flatten(0, 1)), (2, 2)),
            (Parameter(attention), dict(heads=3), list(attention.view(3, 4, 10)), (4, 10))]
    for p, options, parts, shape in pair:
        p = Parameter(p.detach().clone())
        single = [Parameter(part.reshape(shape).clone()) for part in parts]
        ours = Muon([p], lr=0.1, adjust_lr_fn="match_rms_adamw", backend=backend, **options)
        theirs = torch.optim.Muon(single, lr=0.1, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            p.grad = normal(p.shape, torch.float64, numbers)
            for q, grad in zip(single, p.grad.reshape(len(single), *shape), strict=True):
                q.grad = grad.clone()
            ours.step()
            theirs.step()
        assert torch.allclose(p.detach().reshape(len(single), *shape), torch.stack([q.detach() for q in single]),
                              rtol=1e-12, atol=1e-12), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rest_is_adamws(dtype: torch.dtype, backend: str) -> None:
    """Vectors of a mixed group, and all of a group that says so: the bits of AdamW with the same settings."""
    numbers = generator(4)
    matrix, gain, embedding, head = (Parameter(normal(size, dtype, numbers)) for size in ((6, 5), (7,), (9, 4), (4, 3)))
    alone = copy.deepcopy([gain, embedding, head])
    ours = Muon([{"params": [matrix, gain]}, {"params": [embedding, head], "use_muon": False, "lr": 0.3}], lr=0.1,
                adamw_betas=(0.8, 0.9), adamw_eps=1e-6, adamw_weight_decay=0.05, backend=backend)
    theirs = AdamW([{"params": alone[:1]}, {"params": alone[1:], "lr": 0.3}], lr=0.1, betas=(0.8, 0.9), eps=1e-6,
                   weight_decay=0.05, backend=backend)
    for step in range(4):
        for p in (matrix, gain, embedding, head):
            p.grad = normal(p.shape, dtype, numbers)
        gain.grad = None if step == 2 else gain.grad
        for p, q in zip((gain, embedding, head), alone, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip((gain, embedding, head), alone, strict=True):
        assert_same_bits(p, q)
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert_same_bits(ours.state[p][key], value, key)
    assert list(ours.state[matrix]) == ["momentum_buffer"]


def test_adamws_own_learning_rate() -> None:
    p, q = (Parameter(torch.ones(3)) for _ in range(2))
    p.grad = q.grad = torch.ones(3)
    Muon([p], lr=0.5, adamw_lr=0.25, weight_decay=0.1).step()
    AdamW([q], lr=0.25, betas=(0.9, 0.95), weight_decay=0.1).step()
    assert_same_bits(p, q)


def test_complex_vectors_go_to_adamw_and_complex_matrices_nowhere() -> None:
    p = Parameter(torch.ones(3, 2, dtype=torch.complex64))
    p.grad = torch.ones(3, 2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="Muon does not support complex parameters"):
        Muon([p]).step()
    Muon([p], use_muon=False, lr=0.5).step()
    assert bool((p.detach().real < 0.6).all())


def test_checkpoints_of_torch_load_and_ours_load_into_torch() -> None:
    numbers = generator(5)
    mine = [Parameter(normal(shape, torch.float64, numbers)) for shape in SHAPES]
    theirs = copy.deepcopy(mine)
    torchs = torch.optim.Muon(theirs, lr=0.1)
    for _ in range(2):
        for q in theirs:
            q.grad = normal(q.shape, torch.float64, numbers)
        torchs.step()
    ours = Muon(mine)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
            p.grad = q.grad = normal(q.shape, torch.float64, numbers)
    ours.step()
    torchs.step()
    back = torch.optim.Muon(theirs)
    back.load_state_dict(ours.state_dict())
    for p, q in zip(mine, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)
        assert_same_bits(back.state[q]["momentum_buffer"], ours.state[p]["momentum_buffer"])


@pytest.mark.parametrize("options", [dict(lr=-1.0), dict(momentum=-0.1), dict(weight_decay=-1.0), dict(ns_steps=100),
                                     dict(adjust_lr_fn="arbitrary"), dict(lr=torch.ones(2)),
                                     dict(ns_coefficients=(1, 2))], ids=str)
def test_the_errors_of_torch(options: dict[str, Any]) -> None:
    raised = []
    for optimizer in (Muon, torch.optim.Muon):
        p = Parameter(torch.ones(2, 2))
        p.grad = torch.ones(2, 2)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            optimizer([p], **options).step()  # some of torch's come with the first step
        raised.append(str(error.value))
    assert raised[0] == raised[1]


def test_other_errors() -> None:
    weight = Parameter(torch.ones(7, 4))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* has 7 rows, which are no 2 heads"):
        Muon([weight], heads=2)
    with pytest.raises(ValueError, match="Invalid beta parameter at index 1"):
        Muon([weight], adamw_betas=(0.9, 1.0))
    with pytest.raises(TypeError, match="no option 'adam_lr'"):
        Muon([weight], adam_lr=1.0)


def test_orthogonalize_converges_to_the_polar_factor() -> None:
    """The cubic coefficients converge; the polar factor of U S V^T is U V^T."""
    for shape in ((5, 8), (8, 5), (4, 4)):
        x = normal((3, *shape), torch.float64, generator(6))
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        got = orthogonalize(x.clone(), (1.5, -0.5, 0.0), 60, 1e-7, Workspace())
        assert torch.allclose(got, u @ v, atol=1e-9)


def test_the_workspace_is_allocated_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain.optim import muon

    monkeypatch.setattr(muon, "BATCH", 5 * 40)
    params = [Parameter(normal((5, 8), torch.float32, generator(i))) for i in range(12)]
    whole = copy.deepcopy(params)
    optimizer = Muon(params, lr=0.1)
    seen = []
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = normal(p.shape, p.dtype, generator(100 * step + i))
        optimizer.step()
        memory = optimizer._workspace._memory
        seen.append({key: tensor.data_ptr() for key, tensor in memory.items()})
        assert max(tensor.numel() for tensor in memory.values()) == 200
    assert seen[0] == seen[1] == seen[2]
    monkeypatch.undo()
    other = Muon(whole, lr=0.1)
    for step in range(3):
        for i, p in enumerate(whole):
            p.grad = normal(p.shape, p.dtype, generator(100 * step + i))
        other.step()
    for p, q in zip(params, whole, strict=True):
        assert_same_bits(p, q)


def test_empty_matrices() -> None:
    for shape in ((0, 4), (4, 0), (0, 3, 3), (2, 0, 3)):
        p = Parameter(torch.ones(shape))
        p.grad = torch.ones(shape)
        Muon([p]).step()
