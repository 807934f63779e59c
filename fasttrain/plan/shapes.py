"""What a plan has to know of a model: its sizes, from options, from a config.json, or from a table of known ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from fasttrain.train.config import BadInput

Family = Literal["ours", "gpt2", "llama"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only transformer.

    Attributes:
        name: as it is printed.
        family: "ours": the GPT of the main job (`fasttrain.train.model`), whose activations are known to the byte;
            "gpt2": layer norms, biases, learned positions, drop-out; "llama": RMS norms, gates, no biases.
        layers, width, heads, kv_heads, vocabulary: as usual.
        head: features of one head.
        hidden: features within the feed-forward part.
        positions: rows of a table of positions; 0: there is none.
        tied: the head is the embedding.
        gated: the feed-forward part has three matrices.
        dropout: whether there is any, whose masks are kept.
        experts, top_k: of a mixture in the place of each feed-forward part; 0: there is none.
        ngrams, rows: tables of endings of the main job's embedding, one for each length from 2 to `ngrams`.
        source: where the sizes come from.
    """

    name: str
    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    vocabulary: int
    positions: int = 0
    tied: bool = False
    gated: bool = False
    dropout: bool = False
    experts: int = 0
    top_k: int = 0
    ngrams: int = 1
    rows: int = 0
    source: str = "options"

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head", "hidden", "vocabulary", "ngrams"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInput(f"{self.name}: {name} is {value!r}: give an integer of at least 1")
        if self.heads % self.kv_heads:
            raise BadInput(f"{self.name}: {self.heads} heads cannot share {self.kv_heads} heads of keys and values: "
                           f"give a divisor of {self.heads}")
        if self.experts and not 0 < self.top_k <= self.experts:
            raise BadInput(f"{self.name}: each token goes to {self.top_k} of {self.experts} experts: give 1 to "
                           f"{self.experts}")

    @property
    def keys(self) -> int:
        """Features of the keys of one position, of all key-value heads."""
        return self.kv_heads * self.head

    @property
    def queries(self) -> int:
        return self.heads * self.head


def feed_width(width: int, gated: bool) -> int:
    """Features within the main job's feed-forward part, as `fasttrain.train.model` has them."""
    return -(-8 * width // (3 * 64)) * 64 if gated else 4 * width


def ours(layers: int, width: int, heads: int, *, kv_heads: int | None = None, gated: bool = False, tied: bool = False,
         ngrams: int = 1, rows: int = 0, vocabulary: int = 256, experts: int = 0, top_k: int = 2) -> Shape:
    """The GPT of the main job.

    Raises:
        BadInput: its heads have no even number of features.
    """
    if width < 1 or heads < 1 or width % (2 * heads):
        raise BadInput(f"--width {width} with --heads {heads}: each head needs an even number of features; use a width "
                       f"that is a multiple of {2 * max(1, heads)}")
    return Shape("gpt", "ours", layers, width, heads, kv_heads or heads, width // heads,
                 feed_width(width, gated or experts > 0), vocabulary, tied=tied, gated=gated or experts > 0,
                 experts=experts, top_k=top_k if experts else 0, ngrams=ngrams, rows=rows if ngrams > 1 else 0)


def _gpt2(name: str, layers: int, width: int, heads: int) -> Shape:
    return Shape(name, "gpt2", layers, width, heads, heads, width // heads, 4 * width, 50257, 1024, True, False, True,
                 source="Radford et al., Language Models are Unsupervised Multitask Learners (2019), table 2; "
                        "huggingface.co/openai-community")


LLAMA3 = "Llama team, The Llama 3 Herd of Models, arXiv 2407.21783, table 3"
NAMED = {shape.name: shape for shape in (
    _gpt2("gpt2", 12, 768, 12), _gpt2("gpt2-medium", 24, 1024, 16), _gpt2("gpt2-large", 36, 1280, 20),
    _gpt2("gpt2-xl", 48, 1600, 25),
    Shape("llama-3-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, gated=True, source=LLAMA3),
    Shape("llama-3-70b", "llama", 80, 8192, 64, 8, 128, 28672, 128256, gated=True, source=LLAMA3),
    Shape("llama-3-405b", "llama", 126, 16384, 128, 8, 128, 53248, 128256, gated=True, source=LLAMA3),
    Shape("mixtral-8x7b", "llama", 32, 4096, 32, 8, 128, 14336, 32000, gated=True, experts=8, top_k=2,
          source="Jiang et al., Mixtral of Experts, arXiv 2401.04088, table 1"),
)}
LLAMA_LIKE = ("llama", "mistral", "mixtral")


def named(model: str) -> Shape:
    """A shape by its published name, or from the config.json of a Hugging Face model (the file, or its directory).

    Raises:
        BadInput: there is neither, or the file describes another kind of model.

    Example:
        >>> named("llama-3-8b").kv_heads
        8
    """
    if model in NAMED:
        return NAMED[model]
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise BadInput(f"{model}: neither a file nor a name: give gpt (and its options), {', '.join(NAMED)}, or the "
                       "path of a config.json")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: no JSON: {error}") from error
    return from_config(config, str(path))


def from_config(config: Any, name: str) -> Shape:
    """A shape from what a Hugging Face config.json holds.

    Raises:
        BadInput: it is of a kind that is not known here, or lacks a size.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("gpt2", *LLAMA_LIKE):
        raise BadInput(f"{name}: model_type {kind!r}: plans are for {', '.join(('gpt2', *LLAMA_LIKE))}, and for gpt")
    try:
        if kind == "gpt2":
            width, heads = config["n_embd"], config["n_head"]
            return Shape(name, "gpt2", config["n_layer"], width, heads, heads, width // heads,
                         config.get("n_inner") or 4 * width, config["vocab_size"], config["n_positions"],
                         config.get("tie_word_embeddings", True), False, bool(config.get("resid_pdrop", 0.1)),
                         source=name)
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise BadInput(f"{name}: its layers have biases, which plans of Llama-like models do not count")
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return Shape(name, "llama", config["num_hidden_layers"], width, heads,
                     config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads,
                     config["intermediate_size"], config["vocab_size"], tied=config.get("tie_word_embeddings", False),
                     gated=True, experts=config.get("num_local_experts", 0), top_k=config.get("num_experts_per_tok", 0),
                     source=name)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{name}: lacks {error}, or it is no number") from error
