"""Models of transformers divided over the tensor axis are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from divided import LIMIT, STEPS, compare, entropy, lively, whole
from ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard

from fasttrain.checkpoint import Checkpointer
from fasttrain.dist.mesh import Mesh
from fasttrain.optim import AdamW
from fasttrain.parallel.tensor import tensor_parallel

pytest.importorskip("transformers")

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=8, intermediate_size=24,
             max_position_embeddings=16)
KINDS: dict[str, dict[str, Any]] = {
    "Llama": dict(**SIZES, num_key_value_heads=4, pad_token_id=3),
    "Mistral": dict(**SIZES, num_key_value_heads=4, sliding_window=6, tie_word_embeddings=True),
    "Qwen2": dict(**SIZES, num_key_value_heads=4),  # with biases
    "Qwen3": dict(**SIZES, num_key_value_heads=4, head_dim=4),  # with norms of each head
    "GPT2": dict(vocab_size=50, n_embd=16, n_layer=2, n_head=8, n_positions=16, bos_token_id=1, eos_token_id=1,
                 resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0),
}


def built(kind: str) -> nn.Module:
    import transformers

    made = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))
    return lively(made(getattr(transformers, kind + "Config")(**KINDS[kind])).double())


def own_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The model's: it needs all logits."""
    torch.manual_seed(3)  # of what is dropped
    return model(input_ids=tokens[:, 1:], labels=tokens[:, 1:]).loss


VOCABULARY, WHOLE = (entropy, 1e-10, "vocabulary"), (own_loss, 1e-5, "whole")  # their losses are made in float32
CASES = {4: [("Llama", True, WHOLE), ("GPT2", False, VOCABULARY), ("GPT2", True, VOCABULARY)],
         2: [("Llama", False, VOCABULARY), ("Mistral", True, VOCABULARY), ("Qwen2", True, WHOLE),
             ("Qwen3", True, VOCABULARY), ("GPT2", True, WHOLE)]}


def saved(folder: str) -> None:
    """GPT-2's fused heads, in pieces on each rank, are saved in four and loaded in two: weights and states."""
    models = []
    for size in (4, 2):
        mesh = Mesh(tensor=size)
        model = tensor_parallel(built("GPT2").eval(), mesh, sequence=size == 4)
        optimizer = AdamW(model.named_parameters(), lr=1e-2)
        state = {"model": model, "optimizer": optimizer}
        with Checkpointer(folder, mesh=mesh) as checkpoints:
            if size == 4:
                step(model, optimizer)
                checkpoints.save(1, state, {})
            else:
                assert checkpoints.load(state) is not None
        models.append((model, optimizer))
    for _ in range(2):  # as they were saved, and after another step
        (one, first), (other, second) = models
        for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(whole(p.detach()), whole(q.detach()), rtol=1e-9, atol=1e-10, msg=name)
            torch.testing.assert_close(whole(first.state[p]["exp_avg"]), whole(second.state[q]["exp_avg"]), rtol=1e-9,
                                       atol=1e-15, msg=name)
        step(one, first)
        step(other, second)


def step(model: nn.Module, optimizer: AdamW) -> None:
    entropy(model, torch.arange(39).view(3, 13)).backward()
    optimizer.clip_grad_norm_(LIMIT)
    optimizer.step()
    optimizer.zero_grad()


def sharded() -> None:
    """And `fully_shard` cuts them again."""
    mesh = Mesh(shard=2, tensor=2)
    model, alone = built("GPT2").eval(), built("GPT2").eval()
    tensor_parallel(model, mesh, sequence=True)
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    tokens = torch.arange(52).view(4, 13) % 50
    entropy(model, tokens[mesh.replica::2]).backward()
    entropy(alone, tokens).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(whole(p.detach()), q.detach()), name
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-9, atol=1e-12, msg=name)


def trained(wire: Any, folder: str) -> None:
    torch.manual_seed(1)
    for size, cases in CASES.items():
        mesh = Mesh(tensor=size)
        for kind, sequence, (loss, bound, logits) in cases:
            batches = list(torch.randint(50, (STEPS, 3, 13)))
            compare(built(kind), mesh, batches, loss, bound, sequence=sequence, loss=logits)
    bare = built("Llama").model  # without a head
    wanted = bare(batches[0][:, 1:]).last_hidden_state
    found = tensor_parallel(bare, mesh, sequence=True)(batches[0][:, 1:]).last_hidden_state
    torch.testing.assert_close(found, wanted)
    saved(folder)
    sharded()


def test_divided_by_four_and_by_two(tmp_path: Path) -> None:
    run(trained, 4, str(tmp_path))
