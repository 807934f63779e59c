"""Models of transformers divided over the tensor axis are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divided import STEPS, compare, entropy, lively
from ranks import run
from torch import nn

from fasttrain.dist.mesh import Mesh
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


def trained(wire: Any) -> None:
    torch.manual_seed(1)
    for size, cases in CASES.items():
        mesh = Mesh(tensor=size)
        for kind, sequence, (loss, bound, whole) in cases:
            batches = list(torch.randint(50, (STEPS, 3, 13)))
            compare(built(kind), mesh, batches, loss, bound, sequence=sequence, loss=whole)
    bare = built("Llama").model  # without a head
    wanted = bare(batches[0][:, 1:]).last_hidden_state
    found = tensor_parallel(bare, mesh, sequence=True)(batches[0][:, 1:]).last_hidden_state
    torch.testing.assert_close(found, wanted)


def test_divided_by_four_and_by_two() -> None:
    run(trained, 4)
