"""The place in the store where ranks tell of themselves: heartbeats, processes, and the one failure of the job."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

import torch.distributed as dist

from fasttrain.dist.peers import Heard, Identity, Operation, Said, disagreement

TROUBLE_S = 1.5  # that a rank may be in trouble before it says so: time to try again, or to end by the exception
KEPT = 16  # collectives that a rank tells of: enough to find where two ranks parted
Failure = dict[str, Any]  # rank (None: of all), cause and step, as `PeerFailed` takes them


class Board:
    """One rank's view of it. All but `note` and what only reads memory is for one thread: the watcher's.

    Arguments:
        store: of torch.distributed; a connection that nobody else uses.

    Raises:
        RuntimeError: whoever hosts the store has ended; from every method that uses it.
    """

    def __init__(self, store: Any, rank: int, size: int):
        number = dist.PrefixStore("fasttrain/watchers", store).add(str(rank), 1)  # the same on every rank
        self.store = dist.PrefixStore(f"fasttrain/watcher {number}", store)
        self.rank, self.others = rank, [other for other in range(size) if other != rank]
        self.step: int | None = None
        self.trouble: tuple[object, float] | None = None  # what it is, as text, and since when
        self.heard = Heard()
        self.operations: deque[Operation] = deque(maxlen=KEPT)
        self.identities: dict[int, Identity] = {}
        self._beats = 0
        self._look_every_s = min(size**2 / 1e5, 30)  # each rank reads from each: less often if there are many
        self._looked_at = -1e9
        self.store.set(f"who {rank}", json.dumps(Identity.own()))
        self.say()

    def note(self, operation: Operation) -> None:
        """A collective that this rank has issued."""
        if operation.number == 1:  # of a new group, whose name an older one may have had
            self.operations = deque((old for old in self.operations if old.wire != operation.wire), KEPT)
        self.operations.append(operation)

    def say(self, left: bool = False) -> None:
        """Write a heartbeat; the last one if this rank leaves."""
        self._beats += 1
        trouble = self.trouble
        late = trouble is not None and time.monotonic() > trouble[1] + TROUBLE_S
        said = Said(self._beats, self.step, tuple(self.operations.copy()), left,
                    str(trouble[0]) if trouble is not None and late else "")
        self.store.set(f"beat {self.rank}", said.to_json())

    def tell(self, failure: Failure) -> None:
        """Write a failure; if there is one it stays, so that everybody hears of the same."""
        self.store.compare_set("failure", "", json.dumps(failure))

    def listen(self) -> Failure | None:
        """The failure, if there is one."""
        return json.loads(self.store.get("failure")) if self.store.check(["failure"]) else None

    def look(self) -> Failure | None:
        """Look at every peer, for which somebody waits: its process, its last words, whether it is in trouble, and
        whether it issues the same collectives.

        Returns:
            What is wrong, if anything is.
        """
        if time.monotonic() < self._looked_at + self._look_every_s:
            return None
        gone = [rank for rank in self.others if self.state(rank) == "gone"]  # first: its last words say if it left
        for rank, text in self._read("beat", self.others).items():
            self.heard.hear(rank, Said.from_json(text))
        for rank, text in self._read("who", [rank for rank in self.others if rank not in self.identities]).items():
            self.identities[rank] = Identity(*json.loads(text))
        self._looked_at = time.monotonic()
        said = self.heard.said
        for rank in gone:
            if not said[rank].left:
                return self.blame(rank, f"process {self.identities[rank].pid} ended without a word: killed, perhaps for "
                                        f"want of memory")
        for rank, one in said.items():
            if one.trouble:
                return self.blame(rank, one.trouble)
        words = disagreement({**{rank: said[rank].operations for rank in said}, self.rank: self.operations.copy()})
        if words is None:
            return None
        return {"rank": None, "cause": f"the ranks issue different collectives: {words}", "step": self.step}

    def state(self, rank: int) -> str | None:
        """What can be seen of its process: see `Identity.state`."""
        return self.identities[rank].state() if rank in self.identities else None

    def blame(self, rank: int, cause: str) -> Failure:
        """A failure, with the step that is known of that rank."""
        said = self.heard.said.get(rank)
        return {"rank": rank, "cause": cause, "step": self.step if rank == self.rank else said.step if said else None}

    def quiet(self, seconds: float) -> Failure | None:
        """A rank that has been seen to say nothing new for so long."""
        for rank in self.others:
            if (quiet := self.heard.quiet(rank)) > seconds:
                how = "its process is stopped (SIGSTOP)" if self.state(rank) == "stopped" else "its heartbeat stopped"
                return self.blame(rank, f"{how}, no sign of life for {quiet:.1f} s")
        return None

    def left(self) -> Failure | None:
        """A rank that has taken leave."""
        for rank, said in self.heard.said.copy().items():
            if said.left:
                return self.blame(rank, "its program came to its end while others waited for it")
        return None

    def _read(self, what: str, ranks: list[int]) -> dict[int, bytes]:
        """What these ranks have written, of those that have: a read of what is not there would wait for it."""
        keys = {rank: f"{what} {rank}" for rank in ranks}
        if keys and not self.store.check([*keys.values()]):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return dict(zip(keys, self.store.multi_get([*keys.values()]), strict=True)) if keys else {}
