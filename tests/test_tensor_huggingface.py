"""Models of transformers divided over the tensor axis are those of one process."""

import pytest
import torch
from divided import STEPS, compare, entropy, lively
from ranks import run

from fasttrain.dist.mesh import Mesh

pytest.importorskip("transformers")


def built(kind):
    import transformers as hf

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=8, intermediate_size=24,
                 max_position_embeddings=16)
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=8, n_positions=16,
                                                 resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=4, pad_token_id=3))
    elif kind == "llama tied":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=8, tie_word_embeddings=True,
                                                   mlp_bias=True, attention_bias=True))
    elif kind == "mistral":
        model = hf.MistralForCausalLM(hf.MistralConfig(**sizes, num_key_value_heads=4, sliding_window=6))
    elif kind == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, num_key_value_heads=4))
    elif kind == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, num_key_value_heads=4, head_dim=4))
    return lively(model.double())


def trained(wire, cases, size):
    mesh = Mesh(tensor=size)
    torch.manual_seed(1)
    return {str(case): compare(built(case[0]), mesh, list(torch.randint(50, (STEPS, 3, 13))), entropy, 1e-6,
                               sequence=case[1], loss=case[2]) for case in cases}


CASES = [(kind, sequence, loss) for kind in ("llama", "llama tied", "mistral", "qwen2", "qwen3", "gpt2") for sequence, loss in ((False, "vocabulary"), (True, "whole"))]


@pytest.mark.parametrize("size", [2, 4])
def test_models(size):
    for x in run(trained, size, CASES, size)[0].items(): print(x)
