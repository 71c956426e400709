"""A client's accuracy on its held-out records leaves once, with noise, charged before they are looked at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clients.evaluate
import fedlab
from clients.answer import ANSWERS
from clients.policy import OwnPolicy
from fedlab.config import RunConfig
from fedlab.config.client import ClientPolicy
from fedlab.errors import ConfigError, PrivacyError
from fedlab.lora.state import to_wire
from fedlab.models.adapters import initial_state
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.ledger.ledger import events, parse_lines
from fedlab.privacy.scores_plan import ScoresPlan
from fedlab.protocol.messages import EvaluateRequest
from fedlab.run.audit import audit_directory
from fedlab.session import open_session

SCORED = ("privacy.scores_sigma=3.0", "evaluate.clients=last")


def test_the_noise_is_on_the_number_of_right_ones():
    plan = ScoresPlan(2.0, 100, 1e-5, "seeded")
    drawn = [plan.privatise(0.75, 40, np.random.default_rng(i)) * 40 - 30 for i in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.0, abs=0.2)
    assert np.std(drawn) == pytest.approx(2.0, rel=0.06)


@pytest.mark.parametrize(("share", "records"), [(1.01, 10), (-0.1, 10), (math.nan, 10), (0.5, 0)])
def test_what_is_no_share_is_not_released(share: float, records: int):
    with pytest.raises(PrivacyError, match="between 0 and 1"):
        ScoresPlan(2.0, 100, 1e-5, "secure").privatise(share, records, np.random.default_rng(0))


@pytest.fixture
def asked(tiny_toml: str, tmp_path: Path, helpers: Any) -> Any:
    """A node whose client signed the run's plan, and the request for its scores."""
    config = RunConfig.parse(tiny_toml, SCORED)
    session = open_session(config.to_toml())
    node = helpers.own_node(session, tmp_path)
    ANSWERS["train"](node, helpers.train_request(session, ["client-0"]))
    state = initial_state(session.model, config.lora, 0)
    request = EvaluateRequest(helpers.run_reference(session), 3, ("client-0",), (), "float32", to_wire(state))
    return node, request, tmp_path / "client-0.jsonl"


def lines(path: Path) -> list[Any]:
    return parse_lines(path.read_text())


def test_it_is_charged_before_the_records_are_looked_at(asked: Any, monkeypatch: pytest.MonkeyPatch):
    node, request, ledger = asked

    def looks(*_: object) -> float:
        assert lines(ledger)[-1]["type"] == "CHARGE"
        raise ValueError("a crash between charge and release")

    monkeypatch.setattr(clients.evaluate, "primary_score", looks)
    before = len(events(lines(ledger)))
    (reply,) = clients.evaluate.answer_evaluate(node, request).clients
    assert (reply.releases, reply.failure.code) == ((), "failed")
    assert len(events(lines(ledger))) == before + 1, "what was charged and not released counts"


def test_what_leaves_carries_what_was_charged(asked: Any):
    node, request, ledger = asked
    (reply,) = clients.evaluate.answer_evaluate(node, request).clients
    (release,) = reply.releases
    assert (release.name, list(release.arrays)) == ("noised-scores", ["score"])
    assert (release.event.sampler, release.event.q, release.event.sigma, release.event.steps) == ("full", 1.0, 3.0, 1)
    assert events(lines(ledger))[-1] == Event("full", 1.0, 3.0, 1)


def test_a_run_states_and_audits_it(tiny_toml: str, tmp_path: Path):
    plain = fedlab.simulate(RunConfig.parse(tiny_toml, ["evaluate.clients=last"]), tmp_path / "plain", quiet=True)
    run = fedlab.simulate(RunConfig.parse(tiny_toml, SCORED), tmp_path / "scored", quiet=True)
    assert run.result["adapter_digest"] == plain.result["adapter_digest"], "sigma is given: the rounds are the same"
    for client, entry in run.result["clients"].items():
        shown = events(lines(run.path / "ledger" / f"{client}.jsonl"))
        assert Event("full", 1.0, 3.0, 1) in shown
        assert entry["epsilon"] == pytest.approx(epsilon(shown, entry["delta"]), rel=1e-6)
        assert entry["epsilon"] > plain.result["clients"][client]["epsilon"]
        assert 0.0 <= entry["score"] <= 1.0
    assert "sent once which share of its held-out records" in (run.path / "PRIVACY.md").read_text()
    assert audit_directory(run.path, None, [], False) == 0


def test_the_rounds_leave_room_for_it(tiny_toml: str):
    from fedlab.privacy.plan import plan_of

    given = "privacy={unit='example', epsilon=8.0, clip=1.0}"
    plain, scored = (plan_of(RunConfig.parse(tiny_toml, [given, *more]), 90) for more in ((), SCORED))
    assert scored.sigma > plain.sigma
    whole = [scored.event(scored.participations), Event("full", 1.0, 3.0, 1)]
    assert 7.9 < epsilon(whole, scored.delta) <= 8.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["privacy.scores_sigma=1.0", "evaluate.clients=always"], 'set evaluate.clients = "last"'),
        ([*SCORED, "privacy.share_metrics=true"], "without share_metrics"),
        (["privacy={unit='none', scores_sigma=1.0}"], "adds no noise"),
        (["privacy={unit='client', sigma=1.0, clip=1.0, scores_sigma=1.0}"], 'is for unit = "example"'),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], said: str, tiny_toml: str):
    with pytest.raises(ConfigError, match=said):
        RunConfig.parse(tiny_toml, overrides)


def test_a_score_that_is_no_share_is_refused_before_the_run(llama_toml: str):
    from fedlab.run.launch import check

    with pytest.raises(ConfigError, match=r"privacy\.scores_sigma: the primary score is loss"):
        check(RunConfig.parse(llama_toml, SCORED))


def test_a_client_refuses_a_score_that_is_no_share_whoever_the_server_is(llama_toml: str):
    config = RunConfig.parse(llama_toml, SCORED)
    own = OwnPolicy(ClientPolicy(min_sigma=0.1), (config.model.name,), True)
    problems = list(own._problems(config, ()))
    assert any("the primary score is loss" in problem for problem in problems)
    assert own.problem(config, ()) is not None


def test_scores_are_no_release_where_a_record_decides_how_many_are_scored(tiny_toml: str):
    from fedlab.run.launch import check

    config = RunConfig.parse(tiny_toml, SCORED)
    for purged in (True, False):
        own = OwnPolicy(ClientPolicy(min_sigma=0.1, noise="seeded"), (config.model.name,), True, purged)
        said = " ".join(own._problems(config, ()))
        assert ('with data.duplicates = "purge"' in said) == purged
    with pytest.raises(ConfigError, match=r'privacy\.scores_sigma with data\.duplicates = "purge"'):
        check(RunConfig.parse(tiny_toml, [*SCORED, "data.duplicates=purge"]))
