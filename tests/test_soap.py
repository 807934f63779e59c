"""SOAP is its paper's, for every option."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import generator, normal
from papers_soap import soap
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fasttrain.optim import SOAP

DEFAULTS = dict(lr=0.1, betas=(0.9, 0.8), shampoo_beta=0.7, eps=1e-6, weight_decay=0.1, precondition_frequency=2,
                normalize_grads=False, correct_bias=True)
# (options, shape of the parameter, shape and dimensions that are preconditioned)
CASES: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ({}, (4, 6), (4, 6), (0, 1)),
    ({}, (2, 3, 4), (2, 3, 4), (0, 1, 2)),
    ({}, (7,), (7,), ()),
    ({}, (), (), ()),
    (dict(precondition_1d=True, precondition_frequency=4), (3,), (3,), (0,)),
    (dict(precondition_1d=True, max_precond_dim=6), (7,), (7,), ()),
    (dict(max_precond_dim=5), (4, 6), (4, 6), (0,)),
    (dict(merge_dims=True, max_precond_dim=12), (3, 2, 2, 6), (12, 6), (0, 1)),
    (dict(merge_dims=True, max_precond_dim=6), (8, 2, 3), (8, 6), (1,)),
    (dict(normalize_grads=True, weight_decay=0.0), (4, 6), (4, 6), (0, 1)),
    (dict(correct_bias=False, precondition_frequency=1), (5, 3), (5, 3), (0, 1)),
    (dict(shampoo_beta=-1.0, precondition_frequency=3), (4, 6), (4, 6), (0, 1)),
]


# When the bases change: estimates of the eigenvalues, and QR.
TURNING = {"mul.Tensor", "sum.dim_IntList", "sort.default", "index.Tensor", "linalg_qr.default"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_papers(case: Any, dtype: torch.dtype, backend: str) -> None:
    """The first bases are checked to be eigenvectors, and given to the witness: those of an eigenvalue that occurs
    twice, as zero does for one gradient, are not unique. float64 to 1e-9; fp32 to 1e-2 of the way gone, since small
    second moments divide rounding errors; bf16 to seven roundings of its parameter beside.
    """
    options, size, shape, dims = case
    given = {**DEFAULTS, **options}
    numbers = generator(1)
    p = Parameter(normal(size, dtype, numbers))
    optimizer = SOAP([p], **given, backend=backend)
    witness = {key: value for key, value in given.items() if key in DEFAULTS}
    if witness["shampoo_beta"] < 0:
        witness["shampoo_beta"] = given["betas"][1]
    state: dict[str, Any] = {}
    x = p.detach().double().numpy().copy()
    start = x.copy()
    for step in range(7):
        p.grad = normal(size, dtype, numbers)
        optimizer.step()
        x = soap(x, p.grad.double().numpy(), state, shape=shape, dims=dims, **witness)
        if step == 0:
            assert np.array_equal(x, p.detach().double().numpy())
            for dim in dims:  # eigenvectors, the largest eigenvalue first
                gram, basis = (optimizer.state[p][f"{name}_{dim}"].double().numpy() for name in ("GG", "Q"))
                small = (1e-12 if dtype == torch.float64 else 1e-5) * (1 + np.abs(gram).max())
                values = np.diag(basis.T @ gram @ basis)
                assert np.abs(gram - state["L"][dim]).max() <= small
                assert np.abs(basis.T @ basis - np.eye(shape[dim])).max() <= small
                assert np.abs(basis.T @ gram @ basis - np.diag(values)).max() <= small
                assert (np.diff(values) <= small).all()
                state["Q"][dim] = basis.copy()
        bound = 1e-9 if dtype == torch.float64 else 1e-2 * np.abs(x - start).max() + 7 * torch.finfo(dtype).eps * 3
        assert np.abs(p.detach().double().numpy() - x).max() <= bound, step
    assert optimizer.state[p]["step"].item() == 6


class Allocations(TorchDispatchMode):
    """Operations of torch whose result is in memory of its own, of more than one element."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.names += [func.__name__ for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.numel() > 1
                       and x.untyped_storage().data_ptr() not in given]
        return result


@pytest.mark.parametrize("options", [{}, dict(normalize_grads=True, maximize=True, merge_dims=True)], ids=str)
def test_it_allocates_once(options: dict[str, Any], backend: str) -> None:
    numbers = generator(5)
    params = [Parameter(normal(size, dtype, numbers)) for size, dtype in
              (((4, 6), torch.float32), ((2, 3, 4), torch.bfloat16), ((7,), torch.float32), ((5, 8), torch.float64))]
    optimizer = SOAP(params, precondition_frequency=3, **options, backend=backend)
    for step in range(8):
        for p in params:
            p.grad = normal(p.shape, p.dtype, numbers)
        with Allocations() as seen:
            optimizer.step()
        assert (optimizer.last_step.allocations == 0) == (step > 0)
        names = [name for name in seen.names if name not in TURNING] if step in (3, 6) else seen.names
        assert step == 0 or backend == "reference" or not names, (step, names)


def test_a_change_of_options_that_needs_other_states_is_refused() -> None:
    p = Parameter(torch.ones(3, 4))
    optimizer = SOAP([p], max_precond_dim=3)
    p.grad = torch.ones(3, 4)
    optimizer.step()
    optimizer.param_groups[0]["max_precond_dim"] = 10
    optimizer._memo = None
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .* its state 'GG_1' is missing"):
        optimizer.step()


def test_complex_parameters_are_refused() -> None:
    p = Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="SOAP does not support complex parameters"):
        SOAP([p]).step()


@pytest.mark.parametrize("options", [dict(lr=-1.0), dict(eps=-1.0), dict(shampoo_beta=1.0), dict(betas=(0.9, 1.0)),
                                     dict(precondition_frequency=0), dict(weight_decay=-1.0)], ids=str)
def test_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        SOAP([Parameter(torch.ones(2))], **options)
