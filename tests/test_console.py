"""What the user sees: lines in a log, a bar on a terminal."""

import io
import sys

from fasttrain.train.console import Console, line

TRAIN = {"event": "train", "step": 7, "loss": 2.34567, "lr": 0.00123, "tokens_per_s": 12345.6, "seconds": 3.0,
         "share": {"data": 0.01, "forward_backward": 0.9, "communication": 0.05, "optimizer": 0.04}}
VALIDATION = {"event": "validation", "step": 7, "bits_per_byte": 2.5, "bytes": 1234}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines():
    assert line(TRAIN, 100) == ("step   7/100  loss 2.3457  lr 1.23e-03  12,346 tokens/s"
                                "  data 1.0%  fwd+bwd 90.0%  comm 5.0%  opt 4.0%")
    assert line(VALIDATION, 100) == "step   7/100  validation 2.5000 bits/byte over 1,234 bytes"
    of_tokens = {"event": "validation", "step": 7, "bits_per_token": 9.5, "tokens": 1234}
    assert line(of_tokens, 100) == "step   7/100  validation 9.5000 bits/token over 1,234 tokens"


def test_a_line_shows_what_is_known():
    more = TRAIN | {"mfu": 0.412, "memory_gb": 1.5, "peak_gb": 2.0, "skipped": 3}
    assert line(more, 100) == ("step   7/100  loss 2.3457  lr 1.23e-03  12,346 tokens/s  mfu 41.2%"
                               "  data 1.0%  fwd+bwd 90.0%  comm 5.0%  opt 4.0%  1.50 GiB  skipped 3")
    guarded = VALIDATION | {"gap": 0.1, "patience_left": 4}
    assert line(guarded, 100).endswith("over 1,234 bytes  gap +0.1000  patience 4")
    metrics = {"event": "validation", "step": 7, "metrics": {"loss": 1.5, "accuracy": 0.25}}
    assert line(metrics, 100) == "step   7/100  validation loss 1.5000  accuracy 0.2500"
    assert line({"event": "save", "step": 7, "text": "saved"}, 100) == "step   7/100  saved"


def test_what_was_sent():
    wire = {"event": "wire", "step": 7, "bytes": 123456.5, "formula": 123000.0, "exposed_s": 0.0024}
    assert line(wire, 100) == ("step   7/100  communication: 123,456 bytes a step, 123,000 by the formula; "
                               "exposed: 2.4 ms")
    unknown = line({**wire, "bytes": None, "exposed_s": None}, 100)
    assert unknown.endswith("123,000 bytes a step by the formula, not counted; exposed: not measured")


def test_a_log_gets_plain_lines(capsys):
    with Console(steps=100) as console:
        console.show(TRAIN)
        console.show(VALIDATION)
    assert capsys.readouterr().out == line(TRAIN, 100) + "\n" + line(VALIDATION, 100) + "\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    with Console(steps=100) as console:
        console.show(TRAIN)
        console.show(VALIDATION)
    said = screen.getvalue()
    assert "━" in said
    assert "loss 2.3457" in said
    assert "validation 2.5000 bits/byte" in said
    assert said.rstrip().endswith("\x1b[?25h"), "the cursor must come back"
