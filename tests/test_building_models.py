"""The GPT of the main job and transformers' models, built on meta, divided by their plans, and filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from helpers import assert_same_bits
from torch import Tensor, nn

from fasttrain.parallel.building import Normal, Ones, load_pretrained, materialize
from fasttrain.train.model import GPT

pytestmark = pytest.mark.usefixtures("one_thread")
RULES = {"*norm*": Ones(), "*": Normal(0.05)}
TOKENS = torch.arange(24).view(2, 12) % 31


def gpt(tied: bool) -> GPT:
    with torch.device("meta"):
        model = GPT(layers=2, width=32, heads=4, positions=12, vocabulary=31, kv_heads=2, gated=True, tied=tied)
    tables = GPT(layers=1, width=32, heads=4, positions=12)
    model.cos, model.sin = tables.cos, tables.sin
    return model


def whole(p: Any) -> Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def divided(wire: Any, tied: bool, sizes: dict[str, int]) -> None:
    from fasttrain.parallel import Mesh, shard, tensor_parallel

    mesh = Mesh(**sizes, watch=False)
    model = tensor_parallel(gpt(tied), mesh, sequence=not tied, loss="whole")
    if "shard" in sizes:
        shard(model, mesh=mesh)
    materialize(model, seed=5, rules=RULES)
    wanted = materialize(gpt(tied), seed=5, rules=RULES)
    for (name, p), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert_same_bits(whole(p), other.detach(), name)
    torch.testing.assert_close(model(TOKENS), wanted(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"shard": 2, "tensor": 2}])
def test_gpt(tied: bool, sizes: dict[str, int]) -> None:
    ranks.run(divided, 4 if "shard" in sizes else 2, tied, sizes)


# --- Experts, and stages ----------------------------------------------------------------------------------------------

def mixtures(wire: Any) -> dict[str, Tensor]:
    """A mixture of experts over both ranks, and the whole one: the same values, by its own rules."""
    from fasttrain.parallel import Mesh
    from fasttrain.parallel.experts import MoE

    mesh = Mesh(expert=2, watch=False)
    with torch.device("meta"):
        model, one = (MoE(16, 24, 4, 2, gated=True, mesh=each, router_bias=True) for each in (mesh, None))
    materialize(model, seed=2)
    materialize(one, seed=2)
    for (name, p), other in zip(model.named_parameters(), one.named_parameters(), strict=True):
        assert_same_bits(whole(p), other[1].detach(), name)
    assert_same_bits(model.router.bias, torch.zeros(4))
    return {name: p.detach() for name, p in one.named_parameters()}


def test_experts() -> None:
    found, _ = ranks.run(mixtures, 2)
    for name, std in (("experts.up", 0.25), ("experts.down", 24**-0.5), ("router.weight", 0.25)):
        assert abs(float(found[name].std()) / std - 1) < 6 / found[name].numel() ** 0.5


def staged(wire: Any) -> dict[str, Tensor]:
    """Of a model without names of its own for what is tied: the split knows."""
    from fasttrain.parallel import Mesh, pipeline

    mesh = Mesh(pipeline=2, watch=False)
    model = pipeline.split(chain(), mesh)
    materialize(model, seed=4, rules=RULES)
    return {name: p.detach() for name, p in model.named_parameters()}


def chain() -> nn.Sequential:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(31, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 31, bias=False))
    model[3].weight = model[0].weight
    return model


def test_stages() -> None:
    wanted = dict(materialize(chain(), seed=4, rules=RULES).named_parameters())
    found = ranks.run(staged, 2)
    assert {name for one in found for name in one} == {*wanted, "3.weight"}
    for one in found:
        for name, value in one.items():
            assert_same_bits(value, wanted["0.weight" if name == "3.weight" else name].detach(), name)


# --- transformers -----------------------------------------------------------------------------------------------------

def hugging_face(kind: str) -> nn.Module:
    import transformers

    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=31, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=kind == "llama, tied")).eval()


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        return hugging_face(kind)


KINDS = ["gpt2", "llama", "llama, tied"]


@pytest.mark.parametrize("kind", KINDS)
def test_rules_are_those_of_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    found, wanted = materialize(on_meta(kind), seed=0), hugging_face(kind)
    for (name, one), other in zip(found.named_parameters(), wanted.parameters(), strict=True):
        one, other = one.detach(), other.detach()
        if float(other.std()) == 0:
            assert_same_bits(one, other, name)
        else:
            assert abs(float(one.std() / other.std()) - 1) < 6 / one.numel() ** 0.5, name
    for name, buffer in wanted.named_buffers():
        assert_same_bits(found.get_buffer(name), buffer, name)
    assert bool(found(TOKENS).logits.isfinite().all())


def pretrained(wire: Any, kind: str, path: str) -> Tensor:
    from fasttrain.parallel import Mesh, tensor_parallel

    mesh = Mesh(tensor=2, watch=False)
    model = tensor_parallel(on_meta(kind), mesh, loss="whole")
    load_pretrained(model, path, wire=wire)
    return model(TOKENS).logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_pretrained(kind: str, tmp_path: Path) -> None:
    """From what `save_pretrained` writes, in several files with an index."""
    pytest.importorskip("transformers")
    model = hugging_face(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        wanted = model(TOKENS).logits
    for found in ranks.run(pretrained, 2, kind, str(tmp_path)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
