"""Hooks that see what goes in and out, and are gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlab.models.watch import watching


def test_inputs_and_outputs_are_seen_in_the_order_of_the_passes_and_no_longer():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    seen: list[tuple[str, torch.Tensor | None, torch.Tensor]] = []
    x = torch.randn(4, 3)
    with watching({"linear": model[0], "relu": model[1]}, lambda *row: seen.append(row)):
        y = model(x)
    model(x)
    assert [key for key, _, _ in seen] == ["linear", "relu"]
    assert seen[0][1] is x
    assert seen[0][2] is seen[1][1]
    assert seen[1][2] is y


def test_a_module_that_is_called_by_names_alone_has_no_input_to_show():
    class Named(nn.Module):
        def forward(self, *, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + 1

    seen: list[object] = []
    with watching({0: (module := Named())}, lambda _, x, y: seen.append(x)):
        module(hidden=torch.zeros(1))
    assert seen == [None]


def test_hooks_go_when_a_pass_fails():
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError), watching({0: model}, lambda *_: None):
        model(torch.zeros(1, 4))
    assert not model._forward_hooks
