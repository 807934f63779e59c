"""A gigabyte of state to the disk and back: durable, with checksums, beside dd, torch.save and safetensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks import harness
from fasttrain.checkpoint.files import Piece, Reader, publish, write_rank
from fasttrain.checkpoint.regions import Region

BYTES, TENSORS, ROUNDS = 1 << 30, 100, 7


def state(size: int, tensors: int) -> dict[str, torch.Tensor]:
    """So many float32 tensors of so many bytes in all; random, for disks that compress."""
    return {f"model/{number}": torch.randn(size // tensors // 4) for number in range(tensors)}


def pieces(held: dict[str, torch.Tensor]) -> list[Piece]:
    """The same for our writer."""
    return [Piece(name, "F32", tuple(tensor.shape), memoryview(tensor.numpy())) for name, tensor in held.items()]


def synced(path: Path) -> None:
    """Make a file durable, and its name."""
    for one, flags in ((path, os.O_RDONLY), (path.parent, os.O_RDONLY | os.O_DIRECTORY)):
        file = os.open(one, flags)
        os.fsync(file)
        os.close(file)


def writers(held: dict[str, torch.Tensor], folder: Path) -> dict[str, Callable[[], Any]]:
    """Each makes the state durable in `folder`."""
    size = sum(tensor.nbytes for tensor in held.values())

    def ours() -> None:
        write_rank(folder / ".part", 0, 1, pieces(held), {})
        publish(folder, folder / ".part", 1, 1)

    def dd() -> None:
        subprocess.run(["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=16M", f"count={size}", "iflag=count_bytes",
                        "conv=fsync", "status=none"], check=True)

    def bare() -> None:
        """What dd does, with the bytes that all the others write: a disk may treat zeros differently."""
        with open(folder / "bare", "wb", buffering=0) as file:
            for tensor in held.values():
                for begin in range(0, tensor.nbytes, 16 << 20):
                    file.write(memoryview(tensor.numpy()).cast("B")[begin : begin + (16 << 20)])
            os.fsync(file.fileno())

    def torchs() -> None:
        torch.save(held, folder / "state.pt")
        synced(folder / "state.pt")

    def plain() -> None:
        safetensors.torch.save_file(held, folder / "state.safetensors")
        synced(folder / "state.safetensors")

    return {"fasttrain": ours, "dd conv=fsync": dd, "bare writes, fsync": bare, "torch.save, fsync": torchs,
            "safetensors, fsync": plain}


def readers(held: dict[str, torch.Tensor], folder: Path) -> dict[str, Callable[[], Any]]:
    """Each reads what the writers wrote into the memory of `held`, as a load into a model does."""
    def ours(verify: bool, first: bool = False) -> None:
        with Reader(folder / "step-000000000001", verify) as reader:
            if first:
                reader.verify_all((name, Region(tuple(tensor.shape))) for name, tensor in held.items())
            for name, tensor in held.items():
                reader.read(name, out=tensor.numpy())

    def copied(loaded: dict[str, torch.Tensor]) -> None:
        for name, tensor in held.items():
            tensor.copy_(loaded[name])

    return {"fasttrain": lambda: ours(True), "verified first": lambda: ours(True, True),
            "unverified": lambda: ours(False),
            "torch.load": lambda: copied(torch.load(folder / "state.pt")),
            "safetensors": lambda: copied(safetensors.torch.load_file(folder / "state.safetensors"))}


def run(size: int = BYTES, tensors: int = TENSORS, rounds: int = ROUNDS,
        where: Path | None = None) -> list[dict[str, Any]]:
    """Write in turn onto an empty, quiet disk; then read in turn, from the page cache."""
    rows = []
    with tempfile.TemporaryDirectory(dir=where or Path.cwd()) as name:  # /tmp may be memory
        folder, held = Path(name), state(size, tensors)

        def clear(_: str) -> None:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()

        for work, rivals, before in (("write", writers(held, folder), clear), ("read", readers(held, folder), None)):
            if work == "read":
                for write in writers(held, folder).values():
                    write()
            seconds = harness.interleave(rivals, rounds, before)
            rows.append({"work": work, "bytes": size, "tensors": tensors, "seconds": harness.medians(seconds),
                         "ratio": {peer: harness.ratio(seconds, peer, "fasttrain") for peer in rivals}})
            clear("")
    return rows


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = []
    for row in figures:
        for name, seconds in row["seconds"].items():
            ratio = row["ratio"][name]
            lines.append(f"{row['work']:6} {name:20} {seconds * 1e3:8.0f} ms {row['bytes'] / seconds / 1e9:6.2f} GB/s  "
                         f"{ratio['median']:5.2f}x fasttrain's time ({ratio['low']:.2f} to {ratio['high']:.2f})")
    return "\n".join(lines)
