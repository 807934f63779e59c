"""Batches on their way to a device: queued beside the computation, waited for by the stream, never by the host."""

import contextlib
import time

import numpy as np
import pytest
import torch

from fasttrain.data import Loader, Windows
from fasttrain.data import loader as loading
from fasttrain.data.upload import Stay, Upload, upload_to

SOURCE = Windows(np.random.default_rng(0).integers(0, 60_000, 500).astype(np.uint16), 16)


class LateUpload:
    """As `Upload`, whose copies are made when the computing stream has waited for them."""

    def __init__(self):
        self.under_way = 0

    def send(self, batch):
        self.under_way += 1
        copies = {name: torch.full_like(tensor, 77) for name, tensor in batch.items()}
        return copies, (copies, batch)

    def receive(self, sent, event):
        copies, batch = event
        assert sent is copies
        for name, tensor in batch.items():
            copies[name].copy_(tensor)
        self.under_way -= 1
        return copies


@pytest.mark.parametrize("way", [dict(workers=0), dict(workers=2), dict(workers=1, processes=True)], ids=str)
def test_every_batch_is_waited_for_and_some_are_under_way(monkeypatch, way):
    late = LateUpload()
    monkeypatch.setattr(loading, "upload_to", lambda device: late)
    with Loader(SOURCE, 4, seed=1, prefetch=3, **way) as loader:
        found = [next(loader)["tokens"]]
        while late.under_way < (3 if way["workers"] else 0):
            time.sleep(0.001)
        assert late.under_way == (3 if way["workers"] else 0), "what is fetched ahead is sent ahead"
        found = torch.cat([*found, *(next(loader)["tokens"] for _ in range(19))])
        loader.load_state_dict({**loader.state_dict(), "index": 2})
        again = next(loader)
    assert found.dtype == torch.int32
    assert np.array_equal(found, SOURCE.reseeded(1).batch(0, 80))
    assert torch.equal(again["tokens"], found[2:6])
    assert again["indices"].tolist() == [2, 3, 4, 5]


class FakeCuda:
    """Writes down what is asked of torch.cuda."""

    def __init__(self, log):
        self.log, self.now = log, "compute"

    def Stream(self, device):
        return "side"

    def current_stream(self, device):
        fake = self

        class Current:
            def wait_event(self, event):
                fake.log.append(("compute waits for", event))

        return Current()

    @contextlib.contextmanager
    def stream(self, stream):
        self.now = stream
        yield
        self.now = "compute"

    def Event(self):
        fake = self

        class Event:
            def record(self, stream):
                fake.log.append(("event on", stream, self))

        return Event()


def test_an_upload_goes_through_pinned_memory_and_a_stream_of_its_own(monkeypatch):
    log = []
    fake = FakeCuda(log)
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: log.append(("pin",)) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: log.append(
        ("copy on", fake.now, non_blocking)) or tensor.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(("kept for", "compute")))
    upload = Upload(torch.device("cuda"))
    sent, event = upload.send({"tokens": torch.arange(3)})
    assert log == [("pin",), ("copy on", "side", True), ("event on", "side", event)]
    del log[:]
    assert torch.equal(upload.receive(sent, event)["tokens"], torch.arange(3))
    assert log == [("compute waits for", event), ("kept for", "compute")]


def test_devices():
    assert isinstance(upload_to(torch.device("cpu")), Stay)
    with pytest.raises(ValueError, match="device=meta: batches go to 'cpu' or 'cuda'"):
        upload_to(torch.device("meta"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device=cuda: this torch finds no GPU"):
            Loader(SOURCE, 4, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("way", [dict(workers=0), dict(workers=2), dict(workers=1, processes=True)], ids=str)
def test_batches_arrive_on_a_gpu(way):
    with Loader(SOURCE, 8, seed=1, prefetch=3, device="cuda", **way) as loader:
        for step in range(50):
            batch = next(loader)
            assert batch["tokens"].device.type == "cuda"
            torch.cuda._sleep(200_000)  # computation that is behind
            doubled = batch["tokens"] * 2
            assert np.array_equal(doubled.cpu().numpy() // 2, SOURCE.reseeded(1).batch(8 * step, 8))
