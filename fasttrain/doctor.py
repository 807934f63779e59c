"""``fasttrain doctor``: what is installed, which backend each kernel would use, and whether it works."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

import fasttrain
from fasttrain.kernels import cache, dispatch, jit, native, nvrtc
from fasttrain.optim import OPTIMIZERS, RULES
from fasttrain.rule import Rule

PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x", "tyro", "rich", "matplotlib")


def main() -> int:
    """Print the report; 0 if every usable backend gives the reference's bits, else 1."""
    for line in (*versions(), *machine(), *backends()):
        print(line)
    healthy = True
    for device in devices():
        for line, works in trials(device):
            print(line)
            healthy &= works
    print("everything that is installed works" if healthy else "something that is installed does not work (see above)")
    return 0 if healthy else 1


def versions() -> Iterator[str]:
    """Versions of this package, Python and what it can use."""
    yield f"fasttrain {fasttrain.__version__}, Python {platform.python_version()}, {platform.platform()}"
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name}: not installed")
    yield "  " + ", ".join(found)


def machine() -> Iterator[str]:
    """Processor, GPUs, and the compiled part."""
    yield f"processor: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield f"GPU {index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    else:
        yield "GPU: none that torch can use"
    built = native.build_info()
    module, reason = native.load()
    if module is None:
        yield f"compiled part: none ({reason})"
    else:
        yield (f"compiled part: {built.get('compiler', '?')}, instruction sets {', '.join(built.get('isas', []))}; "
               f"in use: {module.isa()}; threads: {module.threading()}")
        yield own_rules()
    cuda = ", ".join(built.get("cuda", []))
    yield f"device code: {cuda}" if cuda else f"device code: none ({built.get('cuda_reason', '?')})"
    yield more_device_code()
    yield f"between processes: {', '.join(collectives()) or 'nothing: this torch has neither gloo nor NCCL'}"


def collectives() -> Iterator[str]:
    """What processes may share gradients by."""
    if dist.is_available() and dist.is_gloo_available():
        yield "gloo"
    if dist.is_available() and dist.is_nccl_available():
        yield "NCCL (beyond one rank: never run)"


def more_device_code() -> str:
    """Whether CUDA kernels that the build has not can be compiled here."""
    try:
        compiler, reason = nvrtc.compiler()
        if compiler is not None:
            where = cache.directory()
            version = ".".join(map(str, compiler.version))
            return (f"other CUDA kernels: compiled at first use by NVRTC {version} (CuPy), and kept in {where} "
                    f"({len(list(where.glob('cuda-*.cubin')))} now)")
    except (OSError, ValueError) as error:  # of the directory; FASTTRAIN_JIT is mistyped
        reason = str(error)
    return f"other CUDA kernels: in Triton ({reason})"


def own_rules() -> str:
    """Whether a rule that is not in the compiled module can be compiled here, tried with one."""
    trial = Rule("Doctor", (), lambda step, lr: {"lr": lr}, lambda p, g, k: p - k.lr * g)
    try:
        number, reason = native.find(trial)
    except ValueError as error:  # FASTTRAIN_JIT is mistyped
        number, reason = None, str(error)
    if number is None:
        return f"your own rules on cpu: on the slow reference backend ({reason})"
    compiler = jit.find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))[0]
    where = cache.directory()
    return (f"your own rules on cpu: compiled at first use by {' '.join(compiler)}, and kept in {where} "
            f"({len(list(where.glob('cpu-*.so')))} now)")


def devices() -> list[torch.device]:
    """The kinds of device that are here."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def backends() -> Iterator[str]:
    """For every kernel, the backend that it would use and why not the others."""
    wanted = dispatch.forced()
    if wanted:
        yield f"FASTTRAIN_BACKEND={wanted} forces the backend"
    for device in devices():
        reasons = dispatch.reasons(device)
        try:
            chosen = dispatch.choose(device)
        except (RuntimeError, ValueError) as error:
            chosen = f"none: {error}"
        yield f"on {device.type}: {', '.join(rule.name for rule in RULES)}"
        for name, reason in reasons.items():
            if name == chosen:
                yield f"  {name:10} used"
            elif reason is None:
                yield f"  {name:10} works if asked for (backend={name!r})"
            else:
                yield f"  {name:10} no: {reason}"
        if chosen not in reasons:
            yield f"  {chosen}"


def trials(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Step a tiny model with every optimizer on each usable backend, and compare bits with the reference."""
    for name, reason in dispatch.reasons(device).items():
        if reason is not None or name == "reference":
            continue
        wrong = []
        for optimizer in OPTIMIZERS:
            for dtype in (torch.float32, torch.bfloat16):
                what = f"{optimizer.__name__} in {dtype}"
                expected = step_tiny_model(optimizer, dtype, device, "reference")
                try:
                    found = step_tiny_model(optimizer, dtype, device, name)
                except Exception as error:  # whatever a broken driver or compiler raises is the diagnosis
                    wrong.append(f"{what} raised {type(error).__name__}: {error}")
                    continue
                if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                           for a, b in zip(expected, found, strict=True)):
                    wrong.append(f"{what} has different bits")
        verdict = "same bits as the reference" if not wrong else f"BROKEN: {'; '.join(wrong)}"
        yield f"tried {name} on {device.type}: {verdict}", not wrong


def step_tiny_model(optimizer: type, dtype: torch.dtype, device: torch.device, backend: str) -> list[Tensor]:
    """Parameters and states after three steps of a model with 1,057 parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((32, 32), (32,), (1,))
    params = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    stepped = optimizer(params, lr=0.01, backend=backend)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        stepped.step()
    states = [state for p in params for state in stepped.state[p].values() if isinstance(state, Tensor)]
    return [tensor.detach().reshape(-1).cpu() for tensor in (*params, *states)]
