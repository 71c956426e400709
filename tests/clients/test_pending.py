"""The one path of a release: nothing private leaves without its charge, nothing public without its sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.account import ClientAccount
from clients.pending import Asked, PendingRelease
from fedlab.config import RunConfig
from fedlab.errors import PrivacyError
from fedlab.privacy.ledger.ledger import parse_lines
from fedlab.privacy.release import PUBLIC, public, sentences
from fedlab.protocol.fields import Failure
from fedlab.session import open_session

VALUES = {"x": np.ones(2, np.float32)}
CONTENT = {"x": torch.ones(2)}


@pytest.fixture
def account(tiny_toml: str, tmp_path: Path, helpers: Any) -> ClientAccount:
    session = open_session(RunConfig.parse(tiny_toml).to_toml())
    made = ClientAccount(session, helpers.owner_at(tmp_path), helpers.run_reference(session))
    made.sign()
    return made


def asked_of(account: ClientAccount) -> Asked:
    return Asked(account.guard, account.terms, account.plan.event(), 1, "0" * 64, "1" * 64)


def kinds(path: Path) -> list[str]:
    return [entry["type"] for entry in parse_lines((path / "client-0.jsonl").read_text())]


def test_what_was_not_charged_stays_with_its_owner():
    with pytest.raises(PrivacyError, match="nothing was charged"):
        PendingRelease("update", guarded=True).commit(3, VALUES, CONTENT)


def test_a_release_carries_what_was_charged(account: ClientAccount, tmp_path: Path):
    pending = PendingRelease("update", guarded=True)
    pending.charge(account, asked_of(account))
    assert kinds(tmp_path) == ["PLAN", "CHARGE"], "on the disk before anything is computed"
    (release,) = pending.commit(3, VALUES, CONTENT)
    assert kinds(tmp_path) == ["PLAN", "CHARGE", "COMMIT"]
    assert release.event is not None
    assert (release.event.q, release.event.sigma, release.event.steps) == (
        account.plan.q,
        account.plan.sigma,
        account.plan.steps,
    )


def test_other_steps_than_were_charged_are_not_released_and_a_failure_counts_in_full(
    account: ClientAccount, tmp_path: Path
):
    pending = PendingRelease("update", guarded=True)
    pending.charge(account, asked_of(account))
    with pytest.raises(PrivacyError, match="2 steps were executed, 3 were charged") as caught:
        pending.commit(2, VALUES, CONTENT)
    pending.fail(caught.value)
    assert pending.failure is not None
    assert pending.failure.code == "ledger"
    assert kinds(tmp_path) == ["PLAN", "CHARGE", "ABORT"]


def test_a_failure_leaves_as_a_code_of_the_closed_list_with_and_without_dp():
    for guarded in (True, False):
        pending = PendingRelease("update", guarded)
        pending.fail(ValueError("patient Quillfeather"))
        assert pending.failure == Failure("failed")


def test_a_public_release_needs_a_sentence_in_the_statement():
    with pytest.raises(PrivacyError, match="has no sentence in the statement"):
        public("labels", {"mean": 1.0})
    assert public("size", {"examples": 3}).event is None


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["size", "timing", "failure"]),
        (["privacy.share_metrics=true"], ["size", "timing", "failure", "training-metrics", "scores"]),
    ],
)
def test_the_statement_has_the_sentences_of_what_is_sent(overrides: list[str], names: list[str], tiny_toml: str):
    assert sentences(RunConfig.parse(tiny_toml, overrides)) == [PUBLIC[name] for name in names]
