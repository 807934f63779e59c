"""Options from a file: the same as on the command line, and the same errors."""

from pathlib import Path

import pytest

from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.options import config_argument, differences, from_file


def read(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    return from_file(tmp_path / "run.toml")


def test_every_option_can_be_given(tmp_path):
    config = TrainConfig(text=Path("/books"), lr=0.5, steps=7, wire="bf16", zero=2, clip=2.0)
    lines = []
    for name, value in config.as_json().items():
        if value is not None and name != "config":
            text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
            lines.append(f"{name.replace('_', '-')} = {text}")
    assert read(tmp_path, "\n".join(lines)) == config
    assert read(tmp_path, "") == TrainConfig()


def test_paths_are_relative_to_the_file(tmp_path):
    assert read(tmp_path, 'text = "books"').text == tmp_path / "books"
    assert read(tmp_path, 'text = "/books"').text == Path("/books")


@pytest.mark.parametrize("text, said", [
    ("step = 5", r"there is no option step; perhaps you meant steps"),
    ("steps = 5.0", r"steps = 5\.0 is not a whole number"),
    ("steps = true", "steps = True is not a whole number"),
    ('lr = "high"', "lr = 'high' is not a number"),
    ('wire = "int4"', "wire = 'int4' is not one of 'same', 'ordered', 'bf16', 'int8'"),
    ("zero = true", "zero = True is not one of 0, 1, 2"),
    ("text = 3", "text = 3 is not a path"),
    ("log-every = 2\nlog_every = 3", "log_every is given twice"),
    ('config = "other.toml"', "there is no option config"),
    ("steps 5", "not TOML"),
])
def test_what_is_wrong_is_said(tmp_path, text, said):
    with pytest.raises(BadInput, match=said) as error:
        read(tmp_path, text)
    assert str(tmp_path / "run.toml") in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        from_file(tmp_path / "none.toml")


def test_where_the_file_is_named():
    assert config_argument(["train", "--steps", "5"]) is None
    assert config_argument(["train", "--config=a.toml"]) == Path("a.toml")
    for arguments in (["train", "--config"], ["train", "--config="]):
        with pytest.raises(BadInput, match="needs the name of a file"):
            config_argument(arguments)
    with pytest.raises(BadInput, match="given twice"):
        config_argument(["train", "--config", "a", "--config=b"])


def test_differences():
    old, new = TrainConfig(out=Path("a")), TrainConfig(out=Path("b"), lr=1.0)
    assert differences(old, new, free=["out"]) == ["--lr was None and is 1.0"]
    assert differences(old, old) == []
