"""``fasttrain tokenize``: token files from text, in worker processes, that can be stopped anywhere and gone on with.

Every token file is a function of its documents and the tokenizer, is written beside its place and renamed when it is
durable; the index comes last. So what is there is complete, and the same command again makes what is not.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fasttrain.data import plan as planning
from fasttrain.data.dataset import FORMAT, INDEX, Part, checksum, read_index
from fasttrain.data.encoders import Bytes, File, NotText, encoder_of, pieces_of
from fasttrain.data.errors import BadShard, DataError
from fasttrain.data.plan import PLAN, Job, Plan
from fasttrain.data.processes import Worker, answers
from fasttrain.data.progress import Progress
from fasttrain.data.shard import Header
from fasttrain.data.writing import ShardWriter, write_durably

SAID_EVERY = 1 << 22  # bytes of text between two signs of life of a worker


def tokenize(inputs: Sequence[str | Path], out: str | Path, tokenizer: str | Path = "bytes", *, held_out: float = 0.03,
             split_by: Literal["path", "content"] = "path", end_token: str | None = None, shard_mb: int = 64,
             processes: int | None = None) -> dict[str, Any]:
    """Write the tokens of text files to a directory that `TokenDataset` reads.

    If it is stopped, by whatever, the same call goes on, and the files are byte for byte those of an unbroken one.

    Args:
        inputs: files, each a document, or directories, all of whose files are but hidden ones and those below `out`.
            What is not text (has a zero byte, or for a tokenizer from a file is not UTF-8) is an error where the user
            named it; in directories it is left out, said and counted.
        out: a directory that does not exist, is empty, or in which the same was begun.
        tokenizer: "bytes", or the path of a file of Hugging Face's `tokenizers`.
        held_out: share of the documents for validation, chosen by the hash of each one's path below its input, so that
            others do not move it; of a single document the end. 0: none.
        split_by: "content" hashes what is in the files instead: equal documents stay together.
        end_token: that ends every document; None: a usual one that the tokenizer has.
        shard_mb: a token file is closed when so many MiB of text are in it.
        processes: how many work, one: this one; None: as many as there are processors.

    Returns:
        The index: JSON values.

    Raises:
        DataError: input or options cannot work, and nothing has been written; the disk is full; `out` is in use, or
            has other tokens (`WrongTokenizer`).
        WorkerDied: a worker was killed; the same call goes on.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in "abc":
        ...     _ = (folder / name).write_text(f"some text of {name}")
        >>> index = tokenize([folder], folder / "tokens", held_out=0.1)
        >>> [(name, split["tokens"]) for name, split in index["splits"].items()]
        [('train', 30), ('validation', 15)]
    """
    out = Path(out)
    if shard_mb < 1 or (processes is not None and processes < 1):
        raise DataError(f"shard_mb={shard_mb}, processes={processes}: both are at least 1")
    if split_by not in ("path", "content"):
        raise DataError(f"split_by={split_by!r}: 'path' or 'content'")
    encoder = encoder_of(tokenizer, end_token)
    plan = planning.make([Path(path) for path in inputs], encoder, held_out, split_by, shard_mb << 20, out)
    _check_space(out, plan, encoder)
    with _held(out):
        if done := _begin(out, plan):
            return done
        if encoder.content is not None:
            write_durably(out / "tokenizer.json", encoder.content)
        write_durably(out / PLAN, json.dumps(plan.about).encode())
        missing = [job for job in plan.jobs if not (out / job.file).exists()]
        _run(out, encoder, missing, processes or len(os.sched_getaffinity(0)), sum(job.size for job in plan.jobs))
        return _finish(out, plan, encoder)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The directory, made if need be, and locked; removed again if nothing was put into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out} is in use: another `fasttrain tokenize` writes to it") from error
        yield
    except OSError as error:
        said = f"{out} cannot be written: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            said += f", {shutil.disk_usage(out).free:,} bytes are free; make room, and the same command goes on"
        raise DataError(said) from error
    finally:
        os.close(folder)


def _check_space(out: Path, plan: Plan, encoder: Bytes | File) -> None:
    """Of bytes it is known how many tokens there will be; of others, that a byte gives less than one."""
    there = out.absolute()
    while not there.exists():
        there = there.parent
    done = sum((out / job.file).stat().st_size for job in plan.jobs if (out / job.file).exists())
    needed, free = sum(job.size for job in plan.jobs) - done, shutil.disk_usage(there).free
    if isinstance(encoder, Bytes) and needed > free:
        raise DataError(f"{out}: the tokens need {needed:,} bytes, and {free:,} are free: make room, or write to "
                        f"another disk")


def _begin(out: Path, plan: Plan) -> dict[str, Any] | None:
    """Make the directory ready to go on in; the index, if all was done before."""
    if (out / INDEX).exists():
        index = read_index(out)
        plan.check_same({**index["made_from"], "times": plan.about["times"]}, out)
        (out / PLAN).unlink(missing_ok=True)
        return index
    if (out / PLAN).exists():
        plan.check_same(json.loads((out / PLAN).read_bytes()), out)
    else:
        foreign = sorted(path.name for path in out.iterdir() if ".part-" not in path.name
                         and path.name != "tokenizer.json")
        if foreign:
            raise DataError(f"{out} is not empty, and no tokens were begun there (it has {foreign[0]}): give another")
    for part in out.glob(".*.part-*"):  # of a process that was killed
        part.unlink()
    return None


def _run(out: Path, encoder: Bytes | File, jobs: list[Job], processes: int, total: int) -> None:
    """Make the token files that are missing."""
    waiting = sorted(jobs, key=lambda job: -job.size)  # the longest first, so that all end together
    with Progress(total, total - sum(job.size for job in jobs)) as progress:
        if min(processes, len(waiting)) <= 1:
            for job in waiting:
                for done, said in Maker(out, encoder).make(job):
                    progress.show(done, said)
            return
        workers: list[Worker] = []
        try:
            for number in range(min(processes, len(waiting))):
                workers.append(Worker(Maker(out, encoder), f"worker {number} of tokenize"))
                workers[-1].ask("make", waiting.pop(0))
            busy = list(workers)
            while busy:
                for worker, (kind, value) in answers(busy):
                    if kind == "part":
                        progress.show(*value)
                    elif waiting:
                        worker.ask("make", waiting.pop(0))
                    else:
                        busy.remove(worker)
        finally:
            for worker in workers:
                worker.close()
            for part in out.glob(".*.part-*"):
                part.unlink()


class Maker:
    """What a worker process has: the tokenizer, and where files go."""

    def __init__(self, out: Path, encoder: Bytes | File):
        self.out, self.encoder = out, encoder

    def make(self, job: Job) -> Iterator[tuple[int, str]]:
        """Write a token file; yields how many more bytes of text are done, and a line for the user or ""."""
        done, encoder = 0, self.encoder
        with ShardWriter(self.out / job.file, encoder.vocabulary, encoder.fingerprint, encoder.separator) as shard:
            for document in job.documents:
                size = document.end - document.begin
                try:
                    for piece in pieces_of(document.path, document.begin, document.end):
                        encoder.check(piece)
                except NotText as error:
                    if document.named:
                        raise DataError(f"{document.path} is not text: {error}; leave it out") from None
                    shard.left_out += 1
                    yield size, f"left out: {document.path} is not text: {error}"
                    continue
                for piece in pieces_of(document.path, document.begin, document.end):
                    shard.add(encoder.encode(piece), end=False)
                    done += len(piece)
                    if done >= SAID_EVERY:
                        yield done, ""
                        done = 0
                shard.add(np.array([encoder.separator][: encoder.separator >= 0], np.int64))
        yield done, ""


def _finish(out: Path, plan: Plan, encoder: Bytes | File) -> dict[str, Any]:
    """Write the index, when all token files are there."""
    splits: dict[str, Any] = {}
    left_out = 0
    for name, jobs in plan.splits.items():
        parts = []
        for job in jobs:
            header = Header.read(out / job.file)
            if header.tokenizer != encoder.fingerprint:
                raise BadShard(out / job.file, "was made with another tokenizer; delete it, and the same command "
                                               "goes on")
            left_out += header.left_out
            parts.append(Part.of(out / job.file, header))
        splits[name] = {"tokens": sum(part.tokens for part in parts), "documents": sum(p.documents for p in parts),
                        "shards": [asdict(part) for part in parts]}
    if not all(split["tokens"] for split in splits.values()):
        for path in (*(out / job.file for job in plan.jobs), out / PLAN, out / "tokenizer.json"):
            path.unlink(missing_ok=True)
        raise DataError(f"there is no text to make {' and '.join(n for n, s in splits.items() if not s['tokens'])} of: "
                        f"{left_out} files that are not text were left out, and no other is there")
    index = {
        "format": FORMAT, "vocabulary": encoder.vocabulary, "left_out": left_out, "empty": plan.empty, "splits": splits,
        "made_from": {key: value for key, value in plan.about.items() if key != "times"},
    }
    write_durably(out / INDEX, json.dumps({**index, "xxh3": checksum(index)}, indent=1).encode())
    (out / PLAN).unlink()
    return index
