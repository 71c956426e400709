"""The empirical audit of a run under shared noise: a correct build passes, too little noise in a share is caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlab.config import RunConfig
from fedlab.privacy.noise_share import NoiseShare
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session, open_session
from fedlab.train import cohort, sums
from fedlab.trainer_audit.empirical import audit_session
from fedlab.trainer_audit.mechanism import check_mechanism

SHARED = ("privacy.survivors=2", "train.steps=1", "train.sampling_rate=0.2", "train.momentum=0")


@pytest.fixture
def session(tiny_toml: str) -> Session:
    return open_session(RunConfig.parse(tiny_toml, SHARED).to_toml())


def test_a_correct_build_passes(session: Session):
    audit = audit_session(session, canaries=500)
    assert not audit.findings
    assert audit.configuration["steps"] == 1
    assert audit.bounds
    assert all(0 <= bound.epsilon <= audit.claimed for bound in audit.bounds)


@pytest.mark.slow
def test_a_correct_build_passes_with_colluding_clients_and_in_production(tiny_toml: str):
    more = ("privacy.survivors=3", "privacy.colluding=1")
    session = open_session(RunConfig.parse(tiny_toml, [*SHARED, *more]).to_toml())
    assert not audit_session(session, canaries=500).findings
    assert not audit_session(session, canaries=200, production=True).findings


def found(session: Session) -> dict[str, list[str]]:
    return {check: sentences for check, sentences in check_mechanism(session).items() if sentences}


def test_a_share_of_too_little_noise_is_caught(session: Session, monkeypatch: pytest.MonkeyPatch):
    """As if all who are drawn, three, were always there: two shares are then 2/3 of the variance."""
    std = NoiseShare.std
    monkeypatch.setattr(NoiseShare, "std", lambda self, sigma, dimension: std(self, sigma, dimension) * (2 / 3) ** 0.5)
    assert any("0.81" in sentence for sentence in found(session)["noise variance"])


@pytest.mark.slow
def test_a_tensor_without_noise_is_caught(session: Session, monkeypatch: pytest.MonkeyPatch):
    share_of = DPPlan.share_of

    def without(self: DPPlan, clipped_sum: Any, dimension: int, source: Any) -> dict[str, np.ndarray]:
        result = share_of(self, clipped_sum, dimension, source)
        name = next(name for name in result if name.startswith("head."))
        exact = clipped_sum[name].double().numpy() / self.shared.grid(self.clip)
        return result | {name: np.rint(exact).astype(np.int64)}

    monkeypatch.setattr(DPPlan, "share_of", without)
    assert any("head." in sentence for sentence in found(session)["noise variance"])


@pytest.mark.slow
def test_noise_that_repeats_itself_is_caught(session: Session, monkeypatch: pytest.MonkeyPatch):
    words = DPPlan.noise_words
    monkeypatch.setattr(DPPlan, "noise_words", lambda self, rng: words(self, np.random.default_rng(1)))
    assert "noise correlation" in found(session)


@pytest.mark.slow
def test_a_clip_that_is_left_out_is_caught(session: Session, monkeypatch: pytest.MonkeyPatch):
    def unclipped(losses: Any, model: Any, names: Any, hooks: Any, local: Any, clip: float) -> dict[str, torch.Tensor]:
        return clipped(losses, model, names, hooks, local, 3 * clip)

    clipped = sums.clipped_sums
    monkeypatch.setattr(sums, "clipped_sums", unclipped)
    assert "sensitivity" in found(session)


@pytest.mark.slow
def test_a_shared_pass_that_mixes_clients_is_caught(session: Session, monkeypatch: pytest.MonkeyPatch):
    add = cohort.add_by_client

    def first(total: Any, gradients: Any, factors: Any, owner: torch.Tensor) -> None:
        add(total, gradients, factors, torch.zeros_like(owner))

    monkeypatch.setattr(cohort, "add_by_client", first)
    assert list(found(session)) == ["shared pass"]
