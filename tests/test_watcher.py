"""When a process fails: every other one ends within five seconds, and says which rank it was and why."""

import contextlib
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ranks
import torch
import torch.distributed as dist

from fasttrain.dist import exchange
from fasttrain.dist.failures import FAILED, INTERRUPTED, PEER_FAILED, PeerFailed, first_words, is_about_a_connection
from fasttrain.dist.peers import Heard, Identity, Operation, Said, disagreement
from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import WireError
from fasttrain.dist.work import flight_recorder

SIZE, CULPRIT, STEP = 3, 1, 4


def one_step(wire):
    """What a training step sends."""
    exchange.ordered_all_reduce(wire, torch.ones(30_000), 1 / wire.size).wait()
    wire.sum_(torch.ones(4))


def waits(wire, work):
    """A rank that is well: notes what it is told where it waits."""
    try:
        work(wire)
    except WireError as error:
        ranks.mark("TOLD")
        os.write(2, f"SAID {type(error).__name__} {error}\n".encode())
        raise


def steps(wire, watcher, fault, *arguments):
    """Some steps, in the last of which `fault` happens to one rank while the others wait for it."""
    for step in range(STEP + 1):
        watcher.step = step
        if step == STEP and wire.rank == CULPRIT:
            time.sleep(0.8)  # the others wait by then, and its heartbeat has told the step
            ranks.mark("FAULT")
            fault(wire, watcher, *arguments)
            return
        waits(wire, one_step)


def raises(wire, watcher):
    raise ValueError("the batch is bad")


def lives_on(wire, watcher):
    with contextlib.suppress(ValueError), watcher.guard():
        raise ValueError("the batch is bad")
    time.sleep(60)


def sends_itself(wire, watcher, number):
    os.kill(os.getpid(), number)


def comes_to_its_end(wire, watcher):
    """A program that believes itself done."""


def exits_at_once(wire, watcher):
    os._exit(0)


def torch_waits(wire, watcher):
    """Inside torch, which knows of no watcher, as `fully_shard` and DTensor do."""
    watcher.step = STEP
    if wire.rank == CULPRIT:
        time.sleep(0.3)
        ranks.mark("FAULT")
        raises(wire, watcher)
    dist.all_reduce(torch.ones(4))


def torch_waits_for_the_dead(wire, watcher):
    if wire.rank == CULPRIT:
        ranks.mark("FAULT")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))


def disagree(wire, watcher):
    """Two buckets in swapped order on one rank."""
    one_step(wire)
    ranks.mark("FAULT")
    sizes = [3000, 6000] if wire.rank == CULPRIT else [6000, 3000]
    works = [exchange.ordered_all_reduce(wire, torch.ones(size)) for size in sizes]
    waits(wire, lambda _: [work.wait() for work in works])


def told_to_stop(wire, watcher):
    """SIGTERM while all is well."""
    watcher.catch_sigterm()
    os.kill(os.getpid(), signal.SIGTERM)
    end = time.monotonic() + 5
    while not watcher.stop_requested and time.monotonic() < end:
        time.sleep(0.01)
    assert watcher.stop_requested
    one_step(wire)


def told_to_stop_after_a_failure(wire, watcher):
    """What torchrun does: SIGTERM to the others half a second after one has failed."""
    watcher.catch_sigterm(on_stop=lambda: os._exit(1))
    wire.barrier()
    if wire.rank == CULPRIT:
        ranks.mark("FAULT")
        raise ValueError("the batch is bad")
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def is_elsewhere(wire, watcher):
    """Alive, and in no hurry."""
    time.sleep(60)


def interrupted(wire, watcher):
    with watcher.guard():
        raise KeyboardInterrupt


SCENES = {
    "raises": (steps, (raises,), {}),
    "lives on": (steps, (lives_on,), {}),
    "killed": (steps, (sends_itself, signal.SIGKILL), {}),
    "stopped": (steps, (sends_itself, signal.SIGSTOP), {"timeout_s": 5, "stopped": True}),
    "comes to its end": (steps, (comes_to_its_end,), {}),
    "exits at once": (steps, (exits_at_once,), {}),
    "is elsewhere": (steps, (is_elsewhere,), {"timeout_s": 3}),
    "torch waits": (torch_waits, (), {}),
    "torch waits for the dead": (torch_waits_for_the_dead, (), {}),
    "disagree": (disagree, (), {}),
    "told to stop": (told_to_stop, (), {}),
    "interrupted": (interrupted, (), {}),
    "told to stop after a failure": (told_to_stop_after_a_failure, (), {}),
}


@pytest.fixture(scope="module")
def scenes():
    """All at once: they do little but wait."""
    with ThreadPoolExecutor(len(SCENES)) as pool:
        begun = {name: pool.submit(ranks.faulty, work, SIZE, *arguments, **options)
                 for name, (work, arguments, options) in SCENES.items()}
        return {name: future.result() for name, future in begun.items()}


RAISED = f"rank {CULPRIT} failed in step {STEP}: ValueError: the batch is bad"
DIED = rf"rank {CULPRIT} failed in step {STEP}: process \d+ ended without a word"


@pytest.mark.parametrize("scene, code, words", [
    ("raises", FAILED, RAISED),
    ("lives on", FAILED, RAISED),
    ("killed", -signal.SIGKILL, DIED),
    ("stopped", None, rf"rank {CULPRIT} failed in step {STEP}: its process is stopped \(SIGSTOP\), no sign of life"),
    ("comes to its end", 0, rf"rank {CULPRIT} failed in step {STEP}: its program came to its end while others waited"),
    ("exits at once", 0, DIED),
])
def test_the_others_are_told_where_they_wait(scenes, scene, code, words):
    ended = scenes[scene]
    (fault,) = ranks.times("FAULT", ended)
    told = ranks.times("TOLD", ended)
    assert ended[CULPRIT].code == code, ended[CULPRIT].text
    assert len(told) == SIZE - 1, ended
    assert max(told) - fault < 5
    for rank, other in enumerate(ended):
        if rank != CULPRIT:
            assert re.search(f"SAID PeerFailed {words}", other.text), other.text
            assert other.code == PEER_FAILED
            assert other.at - max(told) < 4, "it must end after the grace time"
    if code == FAILED:
        assert "Traceback" in ended[CULPRIT].text or scene == "lives on"
        assert ended[CULPRIT].at - fault < 2.5


@pytest.mark.parametrize("scene, words", [
    ("torch waits", RAISED),
    ("torch waits for the dead", rf"rank {CULPRIT} failed: process \d+ ended without a word"),
    ("told to stop after a failure", f"rank {CULPRIT} failed: ValueError: the batch is bad"),
])
def test_they_end_wherever_they_are(scenes, scene, words):
    ended = scenes[scene]
    (fault,) = ranks.times("FAULT", ended)
    for rank, other in enumerate(ended):
        assert other.at - fault < 5
        if rank != CULPRIT:
            assert re.search(rf"fasttrain: rank {rank} ends: {words}", other.text), other.text
            assert other.code == PEER_FAILED


def test_different_collectives_are_the_same_error_everywhere(scenes):
    words = (f"SAID WireError the ranks issue different collectives: collective 3 is all_reduce of 24,000 bytes on "
             f"rank 0 and all_reduce of 12,000 bytes on rank {CULPRIT}\n")
    for rank in scenes["disagree"]:
        assert words in rank.text
        assert rank.code == FAILED
    assert max(ranks.times("TOLD", scenes["disagree"])) - min(ranks.times("FAULT", scenes["disagree"])) < 5


def test_a_timeout_says_where_the_others_were_last(scenes):
    ended = scenes["is elsewhere"]
    (fault,) = ranks.times("FAULT", ended)
    waited = (rf"all_reduce failed on rank \d of {SIZE}, 120,000 bytes: no answer in 3\.\d s.*; "
              rf"rank {CULPRIT} was last at collective {2 * STEP}, all_reduce of 16 bytes, in step {STEP}")
    assert re.search(waited, ended[0].text), ended[0].text
    assert re.search(waited, ended[2].text), ended[2].text
    assert ended[CULPRIT].code == PEER_FAILED
    assert re.search(rf"rank {CULPRIT} ends: rank [02] failed in step {STEP}: WireError: {waited}", ended[CULPRIT].text)
    assert max(rank.at for rank in ended) - fault < 3 + 3


@pytest.mark.parametrize("settings, words", [
    ({}, ""),
    ({"TORCH_FR_BUFFER_SIZE": "0"}, ""),
    ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}, "in the files that TORCH_FR_DUMP_TEMP_FILE names"),
    ({"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_FR_DUMP_TEMP_FILE": "/tmp/fr_"}, "see its dumps in /tmp/fr_<rank>"),
])
def test_the_flight_recorder_is_pointed_to_if_it_is_on(monkeypatch, settings, words):
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE",
                 "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert flight_recorder().endswith(words)
    assert bool(flight_recorder()) == bool(words)


def test_sigterm_is_a_request_while_all_is_well(scenes):
    assert [(rank.code, rank.text) for rank in scenes["told to stop"]] == [(0, "")] * SIZE


def test_a_forked_child_has_no_part_in_it(monkeypatch, capsys):
    """As the worker of a DataLoader, which inherits the hook and the handler, and has no watcher's thread."""
    sent = []
    before = sys.excepthook
    watcher = Watcher(store=dist.HashStore(), rank=0, size=1)
    try:
        monkeypatch.setattr(watcher, "_pid", os.getpid() + 1)
        monkeypatch.setattr("fasttrain.dist.watcher.os.kill", lambda *to: sent.append(to))
        monkeypatch.setattr("fasttrain.dist.watcher.signal.signal", lambda *to: sent.append(to))
        sys.excepthook(ValueError, ValueError("of a child"), None)  # returns: ends nothing
        assert "ValueError: of a child" in capsys.readouterr().err
        watcher._on_sigterm()
        assert sent == [(signal.SIGTERM, signal.SIG_DFL), (os.getpid(), signal.SIGTERM)]
    finally:
        watcher.close()
    assert sys.excepthook is before
    assert watcher.failure() is None


def test_control_c_has_its_own_exit_code(scenes):
    codes = [rank.code for rank in scenes["interrupted"]]
    assert set(codes) <= {INTERRUPTED, PEER_FAILED}
    assert INTERRUPTED in codes


# --- Its parts --------------------------------------------------------------------------------------------------------

def test_a_process_is_known_by_more_than_its_number():
    own = Identity.own()
    assert own.state() == "running"
    assert own._replace(started="1").state() == "gone", "another process that has taken the number"
    assert own._replace(pid=2**22 + 1).state() == "gone"
    assert own._replace(machine="elsewhere").state() is None


def test_a_peer_is_quiet_while_its_beat_is_seen_not_to_change(monkeypatch):
    now = iter([10.0, 11.0, 50.0, 53.0, 54.0])
    monkeypatch.setattr("fasttrain.dist.peers.time.monotonic", lambda: next(now))
    heard = Heard()
    assert heard.quiet(1) == 0
    for beat, quiet in ((1, 0.0), (1, 1.0), (2, 0.0), (2, 3.0)):  # nobody looked between 11 and 50: no news of silence
        heard.hear(1, Said(beat, 5, (Operation("all", 9, "all_to_all", 0),)))
        assert heard.quiet(1) == quiet
    assert str(heard) == "; rank 1 was last at collective 9, all_to_all, in step 5"
    heard.hear(0, Said(1, None, ()))
    assert str(heard).startswith("; rank 0 was last at no collective; rank 1")


def test_only_collectives_of_one_group_and_number_are_compared():
    def told(*operations):
        return [Operation(*o) for o in operations]

    assert disagreement({}) is None
    apart = {0: told(("a", 1, "x", 4), ("a", 2, "y", 4)), 1: told(("b", 1, "z", 4), ("a", 3, "w", 4))}
    assert disagreement(apart) is None
    words = disagreement({0: told(("a", 8, "x", 4), ("a", 7, "y", 4)), 2: told(("a", 8, "y", 4), ("a", 7, "x", 4))})
    assert words == "collective 7 is y of 4 bytes on rank 0 and x of 4 bytes on rank 2", "the first that differs"


@pytest.mark.parametrize("error, wanted", [
    (RuntimeError("[/torch/third_party/gloo/...] Connection closed by peer [127.0.0.1]:1"), True),
    (dist.DistBackendError("NCCL error"), True),
    (dist.DistNetworkError("..."), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
])
def test_what_is_only_an_echo(error, wanted):
    assert is_about_a_connection(error) is wanted


def test_errors_in_one_line():
    assert first_words(ValueError("a\nb")) == "ValueError: a"
    assert first_words(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert first_words("words") == "words"
    error = PeerFailed(1, "a cause", 2)
    copy = error.__reduce__()[0](*error.__reduce__()[1])
    assert str(copy) == str(error) == "rank 1 failed in step 2: a cause"
