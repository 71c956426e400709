"""Losses by chunks are the whole cross-entropy and its gradient, whatever the size of a chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, linear

from fedlab.objectives import vocabulary
from fedlab.objectives.vocabulary import OutputLayer, most_probable, scored, token_losses


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 6), st.integers(2, 12), st.integers(1, 10), st.integers(0, 99), st.booleans())
def test_equal_to_the_whole_in_float64(count: int, width: int, words: int, chunk: int, seed: int, biased: bool):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(words, width, generator=g, dtype=torch.float64)
    bias = torch.randn(words, generator=g, dtype=torch.float64) if biased else None
    targets = torch.randint(words, (count,), generator=g)
    outer = torch.randn(count, generator=g, dtype=torch.float64)
    wanted = cross_entropy(linear(hidden, weight, bias), targets, reduction="none")
    (slope,) = torch.autograd.grad(wanted @ outer, hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHUNK_BYTES", 4 * words * chunk)
        found = token_losses(hidden, targets, weight, bias)
        assert torch.allclose(found, wanted, atol=1e-12)
        assert torch.allclose(torch.autograd.grad(found @ outer, hidden)[0], slope, atol=1e-12)
        best = most_probable(hidden.detach(), weight, bias)
        assert torch.equal(best, linear(hidden, weight, bias).argmax(-1))
        once = scored(hidden.detach(), targets, weight, bias)
        assert torch.equal(once[0], found.detach())
        assert torch.equal(once[1], best)


def test_a_certain_token_has_a_finite_loss_and_a_hopeless_one_too():
    hidden = torch.tensor([[200.0], [-200.0]], requires_grad=True)
    losses = token_losses(hidden, torch.tensor([0, 0]), torch.tensor([[1.0], [-1.0]]), None)
    assert losses.tolist() == pytest.approx([0.0, 400.0])
    (slope,) = torch.autograd.grad(losses.sum(), hidden)
    assert slope[:, 0].tolist() == pytest.approx([0.0, -2.0])


def test_no_more_logits_are_alive_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch):
    sizes, real = [], vocabulary.linear
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * 50 * 3)
    monkeypatch.setattr(vocabulary, "linear", lambda h, w, b: sizes.append(len(h)) or real(h, w, b))
    token_losses(torch.randn(10, 4), torch.arange(10), torch.randn(50, 4), None)
    assert sizes == [3, 3, 3, 1]


def test_a_layer_is_itself_again_afterwards():
    layer, base = nn.Linear(2, 3), nn.Module()
    x = torch.randn(4, 2)
    before = layer(x)
    with OutputLayer.of(base, layer).left_out():
        assert layer(x) is x
    assert torch.equal(layer(x), before)
    assert "forward" not in layer.__dict__


def test_a_bias_that_a_family_adds_to_its_logits_belongs_to_the_layer():
    """BART and its kin: a buffer of the model, which hidden states have no place for."""
    layer, base = nn.Linear(2, 3), nn.Module()
    base.final_logits_bias = nn.Buffer(torch.tensor([[1.0, 2.0, 3.0]]))
    found = OutputLayer.of(base, layer)
    x = torch.randn(4, 2)
    assert torch.equal(found.bias, layer.bias + torch.tensor([1.0, 2.0, 3.0]))
    with found.left_out():
        assert torch.equal(layer(x) + base.final_logits_bias, x)
    assert torch.equal(base.final_logits_bias, torch.tensor([[1.0, 2.0, 3.0]]))
    assert "final_logits_bias" in dict(base.named_buffers())
