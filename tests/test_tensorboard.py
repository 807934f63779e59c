"""Records as TensorBoard reads them back."""

import sys

import pytest

from fasttrain.train.config import BadInput
from fasttrain.train.tensorboard import TensorBoard


def test_numbers_come_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for step in (10, 20):
        board({"event": "train", "step": step, "loss": 1.0 / step, "share": {"data": 0.25}, "note": "text"})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/share/data"]
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]


def test_it_is_an_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BadInput, match=r"pip install 'fasttrain\[tensorboard\]'"):
        TensorBoard(tmp_path)
