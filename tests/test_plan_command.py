"""`fasttrain plan`: what it prints, in text and JSON, and what it refuses."""

import json

import pytest

from fasttrain.cli import main
from fasttrain.plan.hardware import Assumed, device
from fasttrain.plan.job import Job, Way
from fasttrain.plan.planning import plan
from fasttrain.plan.shapes import named
from fasttrain.plan.ways import Asked


def planned(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_text(capsys):
    said = planned(capsys, "llama-3-8b", "--gpus", "16", "--batch", "64", "--show", "3", "--tensor", "2", "--pipeline",
                   "2", "--schedule", "1f1b", "--zero", "1", "--context", "1")
    for part in ("8,030,261,248 parameters", "arXiv 2407.21783", "arXiv 2205.05198", "h100-80: 80 GB",
                 "ways over 16 GPUs", "pipeline=2 data=4 tensor=2 zero=1", "GB on a rank of pipeline place",
                 "across nodes", "bubble if forward pass"):
        assert part in said, part
    rows = [line for line in said.splitlines() if line[:1] in "123" and "zero=1" in line]
    assert len(rows) == 3


def test_json_has_every_way_and_all_its_numbers(capsys):
    said = json.loads(planned(capsys, "gpt", "--gpus", "4", "--kernels", "cpu", "--precision", "fp32", "--show", "0",
                              "--json", "--layers", "2", "--width", "64", "--heads", "2", "--tied"))
    assert said["ways"] == len(said["best"]) > 20
    assert said["model"]["width"] == 64
    assert said["model"]["tied"]
    for one in said["best"]:
        ranks = [sum(memory.values()) for memory in one["memory"].values()]
        assert one["bytes"] == pytest.approx(max(ranks))
        assert one["step_s"] == pytest.approx(sum(one["times"].values()))
        assert one["fits"] == (one["bytes"] <= said["gpu"]["memory"])
        assert one["pipeline"] * one["data"] * one["shard"] * one["tensor"] * one["context"] == 4
    keys = [(not one["fits"], one["step_s"]) for one in said["best"]]
    assert keys == sorted(keys)


def test_what_fits_and_what_is_nearest_where_nothing_does(capsys):
    assert "of which 0 fit" in planned(capsys, "llama-3-70b", "--gpus", "8", "--show", "1", "--tensor", "8")
    job = Job(named("llama-3-8b"), 8192, 64)
    small, _ = plan(job, 8, device("24GiB"), asked=Asked(recompute="full"))
    large, _ = plan(job, 8, device("b200"), asked=Asked(recompute="full"))
    assert sum(one.fits for one in small) < sum(one.fits for one in large)
    unfit = [one.bytes for one in small if not one.fits]
    assert unfit == sorted(unfit)


def test_dividing_takes_less_of_each_rank():
    job = Job(named("llama-3-8b"), 8192, 64)
    by_way = {one.way: one for one in plan(job, 8, device("h100-80"))[0]}
    plain = by_way[Way(data=8)]
    for way in (Way(data=8, zero=1), Way(data=8, zero=2), Way(shard=8, zero=3), Way(data=4, tensor=2),
                Way(data=4, pipeline=2), Way(data=4, context=2), Way(data=8, recompute="full")):
        assert by_way[way].bytes < plain.bytes, way
    assert by_way[Way(data=4, tensor=2, sequence=True)].bytes < by_way[Way(data=4, tensor=2)].bytes
    assert by_way[Way(data=8, recompute="full")].times.compute > plain.times.compute


def test_slower_links_take_longer_where_they_are_used():
    job = Job(named("gpt2-xl"), 1024, 64)
    asked = Asked(axes={"tensor": 1, "context": 1, "data": 16}, zero=0, recompute="none")
    one, two = (plan(job, 16, device("h100-80"), Assumed(8, across=speed), asked)[0][0] for speed in (50e9, 1e9))
    assert two.times.gradients > one.times.gradients
    assert two.times.compute == one.times.compute
    inside, = one.links
    assert 0 < inside.across < inside.sent  # two of sixteen links of the ring


@pytest.mark.parametrize("arguments, parts", [
    (["nothing", "--gpus", "8"], ["neither a file nor a name", "llama-3-8b"]),
    (["gpt2", "--gpus", "0"], ["--gpus 0", "at least 1"]),
    (["gpt2", "--gpus", "8", "--gpu", "h1000"], ["--gpu h1000", "h100-80"]),
    (["gpt2", "--gpus", "8", "--width", "64"], ["--width with gpt2", "plan gpt"]),
    (["gpt2", "--gpus", "8", "--sequence", "2048"], ["--sequence 2048", "positions for 1024"]),
    (["gpt2", "--gpus", "8", "--tensor", "8"], ["cannot be divided", "12 heads"]),
    (["gpt2", "--gpus", "8", "--tensor", "3"], ["no mesh of these sizes"]),
    (["gpt2", "--gpus", "7", "--batch", "10", "--data", "7"], ["a batch of 10", "over 7 ranks"]),
    (["gpt2", "--gpus", "8", "--storage", "9-byte"], ["--storage 9-byte", "8-byte"]),
    (["gpt2", "--gpus", "8", "--precision", "fp32", "--storage", "split"], ["--precision fp32", "plain"]),
    (["gpt2", "--gpus", "8", "--optimizer", "Muon"], ["--optimizer Muon", "element by element"]),
    (["gpt2", "--gpus", "8", "--optimizer", "Nadir"], ["--optimizer Nadir", "none of that name"]),
    (["gpt2", "--gpus", "8", "--schedule", "2f2b"], ["--schedule 2f2b", "1f1b"]),
    (["gpt2", "--gpus", "8", "--efficiency", "2"], ["--efficiency 2.0", "share"]),
    (["gpt2", "--gpus", "8", "--inter-gb-s", "0"], ["--inter-gb-s", "above 0"]),
    (["gpt", "--gpus", "8", "--width", "100"], ["--width 100", "multiple of 8"]),
    (["gpt2", "--gpus", "8", "--expert", "2", "--tensor", "1"], ["no experts"])])
def test_one_line_for_what_cannot_be(capsys, arguments, parts):
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert all(part in said.err for part in ["fasttrain: ", *parts]), said.err


@pytest.mark.parametrize("text, parts", [
    ("{", ["no JSON"]), ('{"model_type": "bert"}', ["model_type 'bert'", "llama"]),
    ('{"model_type": "llama", "hidden_size": 64}', ["lacks"]),
    ('{"model_type": "llama", "attention_bias": true}', ["biases"])])
def test_configurations_that_are_none(capsys, tmp_path, text, parts):
    file = tmp_path / "config.json"
    file.write_text(text)
    assert main(["plan", str(file), "--gpus", "2"]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said
