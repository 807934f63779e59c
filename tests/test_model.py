"""The model: it sees only the past, and its first guess is every byte alike."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttrain.train.model import GPT, Embedding, rotary, rotate
from fasttrain.train.objective import loss_of


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(layers=2, width=32, heads=2, positions=16, ngrams=4, rows=64)
    with torch.no_grad():  # the layers that start at zero would hide a leak
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return model


def test_no_position_sees_a_later_one(model):
    text = torch.randint(0, 256, (2, 16))
    changed = text.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    same = (model(text) == model(changed)).all(dim=-1)
    assert same[:, :9].all()
    assert not same[:, 9:].any()


def test_shorter_sequences_run(model):
    text = torch.randint(0, 256, (2, 16))
    torch.testing.assert_close(model(text)[:, :5], model(text[:, :5]))


def test_first_loss_is_that_of_a_uniform_guess():
    model = GPT(layers=1, width=16, heads=2, positions=8)
    assert loss_of(model, torch.randint(0, 256, (4, 9))).item() == pytest.approx(math.log(256), abs=1e-5)


def test_targets_are_the_next_bytes(model):
    windows = torch.randint(0, 256, (3, 17))
    log_p = model(windows[:, :-1]).log_softmax(-1)
    by_hand = -sum(log_p[b, t, windows[b, t + 1]] for b in range(3) for t in range(16)) / 48
    torch.testing.assert_close(loss_of(model, windows), by_hand)


def test_embedding_sees_the_last_bytes_and_no_more():
    torch.manual_seed(0)
    embedding = Embedding(width=8, ngrams=3, rows=1 << 14)
    text = torch.randint(1, 256, (1, 12))
    for back, seen in ((0, True), (1, True), (2, True), (3, False)):
        changed = text.clone()
        changed[0, 9 - back] = changed[0, 9 - back] % 255 + 1
        assert bool((embedding(text)[0, 9] != embedding(changed)[0, 9]).any()) == seen


def test_endings_of_other_tokens_than_bytes_do_not_meet():
    """(1 after 300) and (2 after 43) would have one number where there were only 257 of them."""
    embedding = Embedding(width=8, ngrams=2, rows=1 << 14, vocabulary=1000)
    pairs = torch.tensor([[300, 1], [43, 2]])
    endings = (embedding(pairs) - embedding.bytes(pairs))[:, 1]
    assert not torch.equal(endings[0], endings[1])
    assert GPT(1, 16, 2, 8, 2, 64, vocabulary=1000)(pairs).shape == (2, 2, 1000)


@pytest.mark.parametrize("label_smoothing, z_loss", [(0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2), (0.0, 0.0)])
def test_smoothing_and_z_loss(model, label_smoothing, z_loss):
    """Beside torch's operations; without both it is torch's own cross-entropy, to the bit."""
    windows = torch.randint(0, 256, (3, 17))
    loss = loss_of(model, windows, label_smoothing, z_loss)
    found = torch.autograd.grad(loss, list(model.parameters()))
    logits = model(windows[:, :-1]).flatten(0, 1)
    by_torch = F.cross_entropy(logits, windows[:, 1:].flatten(), label_smoothing=label_smoothing)
    if z_loss:
        by_torch = by_torch + z_loss * logits.logsumexp(-1).square().mean()
    expected = torch.autograd.grad(by_torch, list(model.parameters()))
    if label_smoothing or z_loss:
        torch.testing.assert_close(loss, by_torch)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # of sums in another order
    else:
        assert torch.equal(loss, by_torch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_endings_spread_over_the_rows():
    embedding = Embedding(width=1, ngrams=4, rows=1024)
    alike = torch.randint(0, 16, (4, 10000)) * 16  # as few low bits as possible: without a hash they meet in 64 rows
    embedding(alike).sum().backward()
    for n, table in enumerate(embedding.endings, 2):
        used = table.weight.grad.count_nonzero() / 1024
        assert used > (0.2 if n == 2 else 0.9), f"endings of {n} bytes: 256 of two, 4096 of three"


def test_rotated_products_depend_on_distance_only():
    cos, sin = rotary(positions=12, features=8)
    q, k = torch.randn(8), torch.randn(8)
    rows = torch.stack([q, k]).view(2, 1, 8).expand(2, 12, 8)
    rq, rk = rotate(rows, cos, sin)
    torch.testing.assert_close(rq[2] @ rk[5], rq[7] @ rk[10])
    assert not torch.isclose(rq[2] @ rk[5], rq[2] @ rk[6])


def test_every_parameter_learns(model):
    loss_of(model, torch.randint(0, 256, (2, 17))).backward()
    for name, p in model.named_parameters():
        assert p.grad.any(), name


def fresh(**options):
    torch.manual_seed(0)
    model = GPT(layers=3, width=32, heads=4, positions=16, ngrams=2, rows=64, vocabulary=32, **options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.double()


def test_shared_heads_of_keys_are_as_many_equal_ones():
    few, many = fresh(kv_heads=2), fresh()
    with torch.no_grad():
        for block, other in zip(few.blocks, many.blocks, strict=True):
            rows = block.qkv.weight.view(2, 4, 8, 32)  # of each head of keys: two of queries, the key, the value
            for head in range(4):
                key = rows[head // 2]
                other.qkv.weight.view(4, 3, 8, 32)[head] = torch.stack([key[head % 2], key[2], key[3]])
            for name in ("out", "up", "down"):
                getattr(other, name).weight.copy_(getattr(block, name).weight)
        many.embedding.load_state_dict(few.embedding.state_dict())
        many.head.load_state_dict(few.head.state_dict())
        for block, other in zip([*few.blocks, few], [*many.blocks, many], strict=True):
            for name, child in block.named_children():
                if isinstance(child, nn.RMSNorm):
                    getattr(other, name).load_state_dict(child.state_dict())
    text = torch.randint(0, 32, (2, 16))
    torch.testing.assert_close(few(text), many(text), rtol=1e-12, atol=1e-12)


def test_attention_is_that_of_its_equation():
    model = fresh()
    block, x = model.blocks[0], torch.randn(2, 16, 32, dtype=torch.float64)
    rows = block.qkv.weight.view(4, 3, 8, 32)
    heads = []
    for q, k, v in ((x @ head.mT for head in heads) for heads in rows):
        q, k = (rotate(part[:, None], model.cos, model.sin)[:, 0] for part in (q, k))
        later = torch.ones(16, 16).triu(1).bool()
        heads.append((q @ k.mT / math.sqrt(8)).masked_fill(later, -math.inf).softmax(-1) @ v)
    by_hand = torch.cat(heads, -1) @ block.out.weight.T
    torch.testing.assert_close(block.attention(x, model.cos, model.sin), by_hand, rtol=1e-12, atol=1e-12)


def test_a_gate_multiplies_what_goes_up():
    model = fresh(gated=True)
    block, x = model.blocks[0], torch.randn(2, 16, 32, dtype=torch.float64)
    assert block.up.weight.shape == block.gate.weight.shape == (128, 32)
    by_hand = (F.silu(x @ block.gate.weight.T) * (x @ block.up.weight.T)) @ block.down.weight.T
    torch.testing.assert_close(block.feed(x), by_hand, rtol=1e-12, atol=1e-12)


def test_a_tied_head_is_the_embedding():
    model = fresh(tied=True)
    assert model.head.weight is model.embedding.bytes.weight
    assert model.tied == {"head.weight": "embedding.bytes.weight"}
    first = GPT(layers=2, width=64, heads=2, positions=8, tied=True)
    assert first(torch.randint(0, 256, (2, 8))).std() < 2  # a first guess that is not far from every byte alike


@pytest.mark.parametrize("options", [{}, {"tied": True, "gated": True}], ids=str)
def test_parts_one_after_the_other_are_the_model_and_keep_their_names(options):
    whole = fresh(**options)
    names = dict(whole.named_parameters(remove_duplicate=False))
    x = text = torch.randint(0, 32, (2, 16))
    found = set()
    for parts in (["embedding", "blocks.0"], ["blocks.2", "head"], ["blocks.1"]):
        stage = fresh(**options)
        stage.keep(parts)
        assert stage.parts() == parts
        own = dict(stage.named_parameters(remove_duplicate=False))
        found |= set(own)
        assert all(torch.equal(p, names[name]) for name, p in own.items())
        if parts[0] == "blocks.2":
            last = stage
        else:
            x = stage(x)
    assert found == set(names)
    assert torch.equal(last(x), whole(text))


def test_unknown_parts_and_heads_that_cannot_share_are_refused():
    with pytest.raises(ValueError, match=r"\['blocks.7'\] are no parts of this model, which has embedding, blocks.0"):
        fresh().keep(["blocks.0", "blocks.7"])
    with pytest.raises(ValueError, match="4 heads cannot share 3 heads of keys"):
        fresh(kv_heads=3)
