"""Weighted means: the value against numpy, the bits against every order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fedlab.lora.average import client_weights, weighted_mean


def updates(clients: int) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(2)
    return {
        f"client-{i}": {"a.lora_B": torch.randn(6, 3, generator=g) * 10**i, "head.w": torch.randn(4, generator=g)}
        for i in range(clients)
    }


def test_mean_against_numpy_in_float64():
    drawn, weights = updates(4), {"client-0": 1.0, "client-1": 2.0, "client-2": 0.0, "client-3": 5.0}
    found = weighted_mean(drawn, weights)
    for name in ("a.lora_B", "head.w"):
        wanted = np.average([drawn[c][name].double().numpy() for c in weights], axis=0, weights=list(weights.values()))
        assert found[name].dtype == torch.float32
        assert np.allclose(found[name].numpy(), wanted, rtol=1e-6)


def test_permuting_clients_changes_no_bit():
    drawn = updates(12)
    weights = {c: 0.1 + i for i, c in enumerate(drawn)}
    reference = weighted_mean(drawn, weights)
    for order in itertools.islice(itertools.permutations(drawn), 0, 10**6, 99991):
        found = weighted_mean({c: drawn[c] for c in order}, weights)
        assert all(torch.equal(found[n], reference[n]) for n in reference)


def test_one_client_is_itself():
    drawn = updates(1)
    found = weighted_mean(drawn, {"client-0": 0.3})
    assert all(torch.equal(found[n], drawn["client-0"][n]) for n in found)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_unusable_weights_are_refused(bad: float):
    with pytest.raises(ValueError, match="weight"):
        weighted_mean(updates(1), {"client-0": bad})


def test_mismatched_updates_are_refused():
    drawn = updates(2)
    del drawn["client-1"]["head.w"]
    with pytest.raises(ValueError, match=r"head\.w"):
        weighted_mean(drawn, {"client-0": 1.0, "client-1": 1.0})
    drawn = updates(2)
    drawn["client-1"]["head.w"] = torch.zeros(1)  # numpy would broadcast this
    with pytest.raises(ValueError, match="shape"):
        weighted_mean(drawn, {"client-0": 1.0, "client-1": 1.0})
    with pytest.raises(ValueError, match="no update"):
        weighted_mean({}, {})


def test_client_weights():
    assert client_weights({"a": 30, "b": 10}, "examples") == {"a": 0.75, "b": 0.25}
    assert client_weights({"a": 30, "b": 10}, "uniform") == {"a": 0.5, "b": 0.5}
    for sizes, kind in (({"a": 0}, "examples"), ({}, "uniform"), ({"a": 1}, "size")):
        with pytest.raises(ValueError, match=r"examples|weigh"):
            client_weights(sizes, kind)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused_and_named(value: float):
    drawn = updates(3)
    drawn["client-1"]["head.w"][2] = value
    with pytest.raises(ValueError, match=r"client-1: head\.w holds NaN or infinite"):
        weighted_mean(drawn, dict.fromkeys(drawn, 1.0))
