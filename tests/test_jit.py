"""Rules that are compiled at first use have the reference's bits."""

from pathlib import Path

import helpers
import pytest
import torch
from compiling import OTHERS, PROCESS, Own, expected, needs_compiler
from forks import python
from helpers import REALS, Case, Configuration, assert_same_bits, assert_same_run, covering, run

from fasttrain.kernels import native
from fasttrain.optim import RULES

pytestmark = needs_compiler

# Parameter, gradient and state dtypes: every pair of them.
KINDS = covering(REALS, (None, *REALS), (None, *REALS))


def own(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(lr=(1e-3, 0.3), beta=(0.1, 0.99), eps=(1e-10, 1e-3))
    monkeypatch.setitem(helpers.BY_NAME, "Own", Configuration("Own", Own, options))


def test_the_bits_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    own(monkeypatch)
    number = native.number_of(Own.rules[0])
    assert number is not None
    assert number >= len(RULES)
    for seed, kinds in enumerate(KINDS):
        case = Case("Own", *kinds, seed=seed)
        assert_same_run(run(case, "cpu"), run(case, "reference"), str(case))


def test_triton_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := helpers.usable("triton"):
        pytest.skip(reason)
    own(monkeypatch)
    for seed, kinds in enumerate(((torch.float32, None, None), (torch.bfloat16, torch.float32, torch.float32))):
        case = Case("Own", *kinds, layouts=("empty", "odd", "strided"), steps=2, seed=seed)
        assert_same_run(run(case, "triton"), run(case, "cpu"), str(case))


@pytest.mark.parametrize("isa", OTHERS)
def test_instruction_sets(isa: str, tmp_path: Path) -> None:
    done = python(PROCESS, str(tmp_path / "p"), FASTTRAIN_ISA=isa)
    if "this processor lacks it" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == isa
    assert_same_bits(torch.load(tmp_path / "p", weights_only=True), expected(), isa)
