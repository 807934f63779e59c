"""Checkpoints that go to other packages and come back: each side is written and read by the other's own code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from checkpointed import Run, Small, assert_same
from safetensors.torch import load_file
from test_checkpoint_reshard import saves
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fasttrain.checkpoint import (
    Checkpointer,
    Mismatch,
    NotACheckpoint,
    export_dcp,
    export_safetensors,
    export_torch,
    import_dcp,
    load_torch,
)
from fasttrain.optim import AdamW, convert

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of two ranks at stage 2, and its state as the ranks gathered it."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, ranks.run(saves, 2, str(folder), 2, "split bf16")[0][0]


def test_weights_as_safetensors(saved: Any, tmp_path: Path) -> None:
    folder, whole = saved
    export_safetensors(folder, tmp_path / "model.safetensors")
    weights = load_file(tmp_path / "model.safetensors")
    assert "head.weight" not in weights  # tied
    assert_same(weights, {name: value for name, value in whole["weights"].items() if name != "head.weight"})


def test_torch_reads_what_is_exported(saved: Any, tmp_path: Path) -> None:
    folder, whole = saved
    export_torch(next(folder.glob("step-*")), tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert_same(found["model"], whole["weights"])
    run = Run(None, None, "split bf16", seed=3)
    run.bare.load_state_dict(found["model"])
    run.optimizer.load_state_dict(found["optimizer"])
    assert_same(run.whole()["states"], whole["states"])
    plain = torch.optim.AdamW([{"params": group["params"]} for group in run.optimizer.param_groups])
    plain.load_state_dict(convert(found["optimizer"], plain))
    plain.step()


def test_dcp_reads_what_is_exported(saved: Any, tmp_path: Path) -> None:
    folder, whole = saved
    export_dcp(folder, tmp_path / "dcp")
    run = Run(None, None, "split bf16", seed=3)
    weights, states = run.bare.state_dict(), get_optimizer_state_dict(run.bare, run.optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_optimizer_state_dict(run.bare, run.optimizer, states)
    run.bare.load_state_dict(weights)
    assert_same(run.whole()["weights"], whole["weights"])
    assert_same(run.whole()["states"], whole["states"])


def loads(wire: Any, how: str, path: str, stage: int, stored: str) -> dict[str, Any]:
    run = Run(wire, stage, stored, seed=4)
    {"torch": load_torch, "dcp": import_dcp}[how](path, {"model": run.model, "optimizer": run.optimizer}, wire)
    return run.whole()


@pytest.mark.parametrize("how, stage, stored", [("torch", 1, "8-byte"), ("torch", 3, "fp32"), ("dcp", 2, "fp32"),
                                                ("dcp", 3, "8-byte"), ("torch", 2, "torch")])
def test_what_torch_wrote_is_loaded_by_any_stage(how: str, stage: int, stored: str, tmp_path: Path) -> None:
    run = Run(None, None, stored)
    for number in range(2):
        run.step(number)
    if how == "torch":
        torch.save({"model": run.bare.state_dict(), "optimizer": run.optimizer.state_dict()}, tmp_path / "file")
    else:
        dcp.save({"model": run.bare.state_dict(), "optimizer": get_optimizer_state_dict(run.bare, run.optimizer)},
                 checkpoint_id=tmp_path / "file", no_dist=True)
    wanted = run.whole()
    for got in ranks.run(loads, 2, how, str(tmp_path / "file"), stage, stored):
        assert_same(got["weights"], wanted["weights"])
        assert_same(got["states"], wanted["states"])


def test_states_by_place_where_a_file_has_no_names(tmp_path: Path) -> None:
    """A file of torch.optim, as scripts have it: with DistributedDataParallel's prefix, and numbered parameters."""
    torch.manual_seed(0)
    old, new = Small(True), Small(True)
    before, after = torch.optim.AdamW(old.parameters(), lr=0.1), AdamW(new.named_parameters())
    old(torch.arange(4)).sum().backward()
    before.step()
    torch.save({"net": {f"module.{name}": value for name, value in old.state_dict().items()},
                "opt": before.state_dict(), "epoch": 3}, tmp_path / "old.pt")
    load_torch(tmp_path / "old.pt", {"net": new, "opt": after})
    assert_same(new.state_dict(), old.state_dict())
    assert after.param_groups[0]["lr"] == 0.1
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        assert_same(dict(after.state[q]), dict(before.state[p]))
    with pytest.raises(Mismatch, match="it has no 'model'; it has 'net', 'opt', 'epoch'"):
        load_torch(tmp_path / "old.pt", {"model": new})


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch trapped",)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = Small(True)
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_torch(tmp_path / "trap.pt", {"model": model})
    dcp.save({"model": model.state_dict(), "value": Trap()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises((pickle.UnpicklingError, dcp.api.CheckpointException)):
        import_dcp(tmp_path / "dcp", {"model": model})
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises((pickle.UnpicklingError, dcp.api.CheckpointException), match="system"):
        import_dcp(tmp_path / "dcp", {"model": model})
    assert not (tmp_path / "trapped").exists()


def test_what_a_checkpoint_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="no directory of complete ones"):
        export_torch(tmp_path, tmp_path / "x.pt")
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"net": Small(True)}).wait()
    with pytest.raises(NotACheckpoint, match="has no model 'model'; it has 'net'"):
        export_safetensors(tmp_path, tmp_path / "x")
    with pytest.raises(NotACheckpoint, match="has no optimizer 'optimizer'; it has none"):
        export_torch(tmp_path, tmp_path / "x", model="net")
    export_torch(tmp_path, tmp_path / "x", model="net", optimizer=None)
