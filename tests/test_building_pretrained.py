"""Weights of safetensors files in models that are divided: the right values, and only this process's part of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from shards import LAYOUTS, assert_same_parts, placed
from test_building import Small, built
from torch import nn

from fasttrain.parallel.building import load_pretrained, materialize, stored

pytestmark = pytest.mark.usefixtures("one_thread")
KEPT = [name for name in LAYOUTS if name != "strided"]


def on_meta() -> Small:
    with torch.device("meta"):
        return Small()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def saved(path: Path, index: bool = False) -> dict[str, torch.Tensor]:
    """The file of a small model, or the files and their index."""
    found = weights(built(seed=11))
    if not index:
        save_file(found, path / "model.safetensors")
        return found
    names = list(found)
    for number, some in enumerate((names[:3], names[3:])):
        save_file({name: found[name] for name in some}, path / f"model-{number}.safetensors")
    where = {name: f"model-{int(name not in names[:3])}.safetensors" for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return found


@pytest.mark.parametrize("index", [False, True])
def test_one_process(tmp_path: Path, index: bool) -> None:
    wanted = saved(tmp_path, index)
    file = "model.safetensors.index.json" if index else "model.safetensors"
    for path in (tmp_path, tmp_path / file):
        for model in (on_meta(), built(seed=1)):  # into new memory, and over what is there
            assert load_pretrained(model, path) is model
            assert model.head.weight is model.embedding.weight
            for name, value in weights(model).items():
                assert_same_bits(value, wanted[name], name)
            assert_same_bits(model.tables, torch.arange(16.0).cos())


def test_names_and_dtypes(tmp_path: Path) -> None:
    """A tied weight under its other name, a prefix, another dtype here than there."""
    wanted = weights(built(seed=11))
    there = {f"model.{name}": value.bfloat16() for name, value in wanted.items() if name != "embedding.weight"}
    save_file({**there, "model.head.weight": wanted["embedding.weight"].bfloat16()}, tmp_path / "a.safetensors")
    model = load_pretrained(on_meta(), tmp_path, names=lambda name: f"model.{name}")
    for name, value in weights(model).items():
        assert_same_bits(value, wanted[name].bfloat16().float(), name)
    mapped = load_pretrained(on_meta(), tmp_path, names={name: f"model.{name}" for name in [*wanted, "head.weight"]})
    assert_same_bits(mapped.up.weight.detach(), model.up.weight.detach())


def cut(wire: Any, path: str) -> None:
    """Every placement, in pieces of a few bytes; real and on meta."""
    from torch.distributed.device_mesh import init_device_mesh

    wholes = load_file(path)
    stored.AT_ONCE = 100
    meshes = {shape: init_device_mesh("cpu", shape) for shape in ((4,), (2, 2))}
    for number, name in enumerate(KEPT):
        mesh_shape, placements = LAYOUTS[name]
        mesh = meshes[mesh_shape]
        model = nn.ParameterDict()
        for key, value in wholes.items():
            part = torch.zeros(value.shape)
            if all(getattr(one, "dim", 0) < value.dim() for one in placements):
                part = placed(part, mesh, placements)
            model[key] = nn.Parameter(part.to("meta") if number % 2 else part)
        load_pretrained(model, path, wire=wire)
        for key, value in wholes.items():
            if hasattr(model[key], "placements"):
                assert_same_parts(model[key], value, f"{name} {key}")
            else:
                assert_same_bits(model[key].detach(), value, key)


def test_any_placement(tmp_path: Path) -> None:
    shapes = {"a": (8, 12), "b": (16, 4, 3), "c": (12,), "d": (8, 1), "e": (5, 7), "f": (2, 3), "g": ()}
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "m.safetensors")
    ranks.run(cut, 4, str(tmp_path / "m.safetensors"))


def sharded(wire: Any, path: str) -> None:
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (wire.size,))
    model = on_meta()
    for part in (model.up, model):
        fsdp.fully_shard(part, mesh=mesh)
    load_pretrained(model, path)
    wanted = load_pretrained(on_meta(), path)
    x = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(x), wanted(x), rtol=1e-6, atol=1e-6)


def test_fully_sharded(tmp_path: Path) -> None:
    saved(tmp_path)
    ranks.run(sharded, 2, str(tmp_path))


# --- Memory -----------------------------------------------------------------------------------------------------------

LAYERS, ROWS, COLUMNS = 4, 6400, 4096  # of float32: 105 MB each


def grown(work: Any) -> int:
    """By how many bytes the most memory of this process exceeds what it had before."""

    def now(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = now("VmRSS")
    kept = work()
    most = now("VmHWM") - before
    del kept
    return most


def read(wire: Any, path: str, naive: bool) -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (wire.size,))

    def model() -> nn.ModuleList:
        with torch.device("meta"):
            layers = nn.ModuleList(nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS))
            for number, layer in enumerate(layers):
                layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(number % 2)]))
            return layers

    def plain() -> list[Any]:
        found = load_file(path)
        return [distribute_tensor(value.clone(), mesh, [Shard(0)], src_data_rank=None) for value in found.values()]

    small = model()
    return grown(plain if naive else lambda: load_pretrained(small, path))


def test_memory(tmp_path: Path) -> None:
    """Of 419 MB four ranks have a quarter each, and what is mapped at a time; who loads whole tensors has far more."""
    size = ROWS * COLUMNS * 4
    header = {f"{number}.weight": {"dtype": "F32", "shape": [ROWS, COLUMNS], "data_offsets": [
        number * size, (number + 1) * size]} for number in range(LAYERS)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + LAYERS * size)  # zeros that the disk does not hold
    quarter, margin = LAYERS * size // 4, 2 * stored.AT_ONCE + (16 << 20)
    for most in ranks.run(read, 4, str(tmp_path / "m.safetensors"), False):
        assert quarter * 0.95 <= most <= quarter + margin
    assert min(ranks.run(read, 1, str(tmp_path / "m.safetensors"), True)) > 2 * quarter + margin


# --- What does not fit ------------------------------------------------------------------------------------------------

def test_differences_are_named(tmp_path: Path) -> None:
    found = saved(tmp_path)
    del found["up.weight"]
    found["down.bias"], found["norm.weight"], found["more"] = torch.zeros(3), torch.ones(16).int(), torch.zeros(1)
    save_file(found, tmp_path / "model.safetensors")
    model = built(seed=1)
    before = weights(model)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_pretrained(model, tmp_path)
    for words in ("missing in the file (1): up.weight", "unexpected in the file (1): more", "(2): norm.weight: "
                  "torch.float32 here, torch.int32 in the file, down.bias: (16,) here, (3,) in the file",
                  "give wire= if this is one stage of several"):
        assert words in str(error.value)
    for name, value in weights(model).items():
        assert_same_bits(value, before[name])
    with pytest.raises(ValueError, match="of another shape"):
        load_pretrained(model, tmp_path, strict=False)


def test_not_strict(tmp_path: Path) -> None:
    """What is missing stays on meta, and is drawn then."""
    found = saved(tmp_path)
    del found["up.weight"]
    save_file({**found, "more": torch.zeros(1)}, tmp_path / "model.safetensors")
    model = load_pretrained(on_meta(), tmp_path, strict=False)
    assert model.up.weight.is_meta
    materialize(model, seed=3)
    assert_same_bits(model.up.weight.detach(), built(seed=3).up.weight.detach())
    assert_same_bits(model.norm.weight.detach(), found["norm.weight"])


def stages(wire: Any, path: str) -> str:
    """Each rank has other parts: together they have all of the file, but for one tensor."""
    model = on_meta()
    for name in ("embedding", "norm", "head") if wire.rank else ("up", "down"):
        delattr(model, name)
    with pytest.raises(ValueError, match="unexpected in the file") as alone:
        load_pretrained(model, path)
    assert "norm.weight" in str(alone.value) or "up.weight" in str(alone.value)
    with pytest.raises(ValueError, match="does not fit") as together:
        load_pretrained(model, path, wire=wire)
    return str(together.value)


def test_stages(tmp_path: Path) -> None:
    found = saved(tmp_path)
    del found["norm.bias"]
    save_file({**found, "more": torch.zeros(1)}, tmp_path / "model.safetensors")
    one, other = ranks.run(stages, 2, str(tmp_path / "model.safetensors"))
    assert one == other
    assert "missing in the file (1): norm.bias\n" in one
    assert "unexpected in the file (1): more\n" in one


def test_files(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "has neither files of safetensors nor an index"),
                        (tmp_path / "none.safetensors", "is not there: give a file of safetensors")):
        with pytest.raises(FileNotFoundError, match=words):
            load_pretrained(on_meta(), path)
    index = tmp_path / "model.safetensors.index.json"
    for told, words in (({"weight_map": {"a": "../b.safetensors"}}, "those of an index lie beside it"),
                        ([], "is no index of safetensors")):
        index.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=words):
            load_pretrained(on_meta(), tmp_path)
    saved(tmp_path, index=True)
    told = json.loads(index.read_text())
    told["weight_map"]["other"] = "model-0.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"names other, which model-0.safetensors does not have"):
        load_pretrained(on_meta(), tmp_path)
    index.unlink()
    save_file({"up.bias": torch.zeros(32)}, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match=r"up.bias is in .*model-.*safetensors and in .*twice.safetensors"):
        load_pretrained(on_meta(), tmp_path)
