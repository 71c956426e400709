"""Attacks: what each sends, that only attackers change, and that draws depend on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlab.lora.attacks import ATTACKS, attack, flip_labels
from fedlab.lora.average import weighted_mean
from fedlab.lora.robust import RULES
from fedlab.lora.state import check_update

State = dict[str, torch.Tensor]
HOSTILE = ["client-1", "client-4", "client-10"]


def honest(clients: int = 11) -> dict[str, State]:
    g = torch.Generator().manual_seed(1)
    centre = {"a.lora_B": torch.randn(8, 4, generator=g), "head.w": torch.randn(40, generator=g)}
    return {
        f"client-{i}": {n: c + 0.5 * torch.randn(c.shape, generator=g) for n, c in centre.items()}
        for i in range(clients)
    }


@pytest.mark.parametrize("name", ATTACKS)
def test_only_attackers_change_and_the_input_stays(name: str):
    updates, kept = honest(), honest()
    found = attack(name, updates, HOSTILE, seed=3)
    assert list(found) == list(updates)
    for client, state in found.items():
        assert all(torch.equal(updates[client][n], kept[client][n]) for n in state)
        assert all(state[n].dtype == torch.float32 and state[n].shape == kept[client][n].shape for n in state)
        assert (client in HOSTILE) == any(not torch.equal(state[n], kept[client][n]) for n in state)


@pytest.mark.parametrize("name", ATTACKS)
def test_order_of_clients_and_attackers_changes_no_bit(name: str):
    wanted = attack(name, honest(), HOSTILE, seed=3)
    found = attack(name, dict(reversed(honest().items())), HOSTILE[::-1], seed=3)
    assert all(torch.equal(found[c][n].nan_to_num(7), wanted[c][n].nan_to_num(7)) for c in wanted for n in wanted[c])


def test_no_attacker_is_no_attack():
    updates = honest()
    assert all(attack(name, updates, [], seed=0) == updates for name in ATTACKS)


def test_values():
    updates = honest()
    own = updates["client-4"]["head.w"]
    assert torch.equal(attack("sign_flip", updates, HOSTILE, 0, scale=2.0)["client-4"]["head.w"], -2 * own)
    assert torch.equal(attack("scaling", updates, HOSTILE, 0, factor=7.0)["client-4"]["head.w"], 7 * own)
    assert attack("nan", updates, HOSTILE, 0)["client-4"]["head.w"].isnan().all()
    assert check_update(attack("nan", updates, HOSTILE, 0)["client-4"], updates["client-4"], updates["client-4"])


def test_gaussian_has_its_spread_and_its_stream():
    updates = {f"client-{i}": {"head.w": torch.zeros(20000)} for i in range(3)}
    both, one = (
        attack("gaussian", updates, ["client-0", "client-2"], 5, std=3.0),
        attack("gaussian", updates, ["client-2"], 5, std=3.0),
    )
    assert torch.equal(both["client-2"]["head.w"], one["client-2"]["head.w"])
    assert not torch.equal(both["client-2"]["head.w"], both["client-0"]["head.w"])
    assert not torch.equal(
        one["client-2"]["head.w"], attack("gaussian", updates, ["client-2"], 6, std=3.0)["client-2"]["head.w"]
    )
    assert abs(float(one["client-2"]["head.w"].std()) - 3.0) < 0.1


def test_little_is_enough_sends_mean_less_z_deviations():
    updates = honest()
    found = attack("little_is_enough", updates, HOSTILE, 0, z=1.5)
    rows = np.stack([updates[c]["head.w"].double().numpy() for c in HOSTILE])
    wanted = rows.mean(0) - 1.5 * rows.std(0, ddof=1)
    assert all(np.allclose(found[c]["head.w"].numpy(), wanted, rtol=1e-6, atol=1e-6) for c in HOSTILE)
    automatic = attack("little_is_enough", updates, HOSTILE, 0)  # n = 11, f = 3: s = 3, Φ(z) = 5/8
    wanted = rows.mean(0) - 0.3186393639643752 * rows.std(0, ddof=1)
    assert np.allclose(automatic["client-1"]["head.w"].numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_flip_labels():
    labels = torch.tensor([0, 1, 2, 3])
    assert flip_labels(labels, 4).tolist() == [3, 2, 1, 0]
    assert torch.equal(flip_labels(flip_labels(labels, 4), 4), labels)
    assert flip_labels(labels, 4).dtype == labels.dtype
    assert flip_labels(torch.tensor([2], dtype=torch.uint8), 10).tolist() == [7]
    assert flip_labels(labels[:0], 4).tolist() == []
    for bad, words in (
        (torch.tensor([4]), r"\[0, 4\), got 4 to 4"),
        (torch.tensor([-100]), "got -100"),
        (torch.tensor([0.0]), "integers"),
    ):
        with pytest.raises(ValueError, match=words):
            flip_labels(bad, 4)


def test_refusals():
    updates = honest()
    with pytest.raises(ValueError, match=r"attack must be one of gaussian, .* got 'flip'"):
        attack("flip", updates, HOSTILE, 0)
    with pytest.raises(ValueError, match="'client-77' is none of the 11 clients"):
        attack("nan", updates, ["client-77"], 0)
    with pytest.raises(ValueError, match="at least 2"):
        attack("little_is_enough", updates, ["client-1"], 0)
    with pytest.raises(ValueError, match="state z"):
        attack("little_is_enough", updates, list(updates), 0)
    with pytest.raises(ValueError, match="std must be >= 0"):
        attack("gaussian", updates, HOSTILE, 0, std=math.nan)
    with pytest.raises(TypeError):
        attack("nan", updates, HOSTILE, 0, scale=1.0)


@pytest.mark.parametrize("name", ["sign_flip", "scaling", "gaussian"])
def test_rules_hold_where_the_mean_fails(name: str):
    """Three of fifteen clients; relative distance to the mean of the honest ones."""
    updates, hostile = honest(15), HOSTILE
    strength = {"sign_flip": {"scale": 4.0}, "scaling": {"factor": 100.0}, "gaussian": {"std": 100.0}}[name]
    arrived, weights = attack(name, updates, hostile, 0, **strength), dict.fromkeys(updates, 1.0)
    wanted = weighted_mean({c: u for c, u in updates.items() if c not in hostile}, weights)

    def distance(state: State) -> float:
        parts = [(state[n] - wanted[n]).square().sum() for n in wanted]
        return math.sqrt(sum(parts) / sum(w.square().sum() for w in wanted.values()))

    options = {
        "bulyan": {"byzantine": 3},
        "krum": {"byzantine": 3},
        "multi_krum": {"byzantine": 3},
        "trimmed_mean": {"trim": 0.2},
    }
    allowed = {
        "krum": 0.7,
        "norm_bounded_mean": 0.6,
    }  # Krum is one client and as far as one; bounded sign flips still pull
    assert distance(weighted_mean(arrived, weights)) > 0.9
    for rule, call in RULES.items():
        assert distance(call(arrived, weights, **options.get(rule, {}))) < allowed.get(rule, 0.35), rule
