"""Scores are of held-out examples: of the test split for the model, of its own held-out part for each client."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.data import FederatedData
from fedlab.evaluate import evaluate, primary_score
from fedlab.lora.state import State
from fedlab.run.checkpoint import load_checkpoint
from fedlab.run.directory import RunDirectory
from fedlab.session import Session, open_session

HALF = "data.test_fraction=0.5"  # so that no client's share is one and the same of both parts


def ended(run: fedlab.Run) -> tuple[Session, State]:
    """The session of a run, its model as the run left it."""
    session = open_session(RunConfig.load(run.path / "run.toml").to_toml())
    found = load_checkpoint(RunDirectory.open(run.path))
    assert found is not None
    session.model.load(found[1])
    return session, found[1]


def primaries(session: Session, data: FederatedData, held_out: bool) -> dict[str, float]:
    return {
        client: primary_score(
            session.model, data, data.local_test(client) if held_out else data.train(client), session.config
        )
        for client in data.clients
    }


@pytest.mark.parametrize(
    "privacy",
    ["{unit='none'}", "{unit='example', sigma=1.0, clip=1.0}"],
    ids=["measured by the clients", "measured by the simulation"],
)
def test_a_clients_score_is_that_of_its_held_out_examples(privacy: str, learnable_toml: str, tmp_path: Path):
    config = RunConfig.parse(learnable_toml, [f"privacy={privacy}", HALF, "run.rounds=1", "evaluate.clients=always"])
    run = fedlab.simulate(config, tmp_path / "run", quiet=True)
    session, _ = ended(run)
    wanted, trained_on = (primaries(session, session.data, held_out) for held_out in (True, False))
    assert wanted != trained_on, "here it makes a difference"
    scored = [json.loads(line) for line in (run.path / "metrics.jsonl").open() if '"evaluate_clients"' in line]
    assert scored[-1]["per_client"] == pytest.approx(wanted)
    assert {client: info["score"] for client, info in run.result["clients"].items()} == pytest.approx(wanted)
    assert run.result["client_scores"]["worst"] == pytest.approx(min(wanted.values()))
    assert run.result["client_scores"]["curve"] == pytest.approx(sorted(wanted.values()))
    assert "the worst first" in (run.path / "report.html").read_text()
    assert run.result["scores"] == pytest.approx(
        evaluate(session.model, session.data, session.data.test, session.config)
    )


def test_a_tasks_scores_are_those_of_held_out_texts(stream_toml: str, tmp_path: Path):
    config = RunConfig.parse(stream_toml, ["strategy={name='fedavg'}", HALF, "run.rounds=1", "evaluate.clients=last"])
    fedlab.simulate(config, tmp_path / "run", quiet=True)
    last = sorted((tmp_path / "run").glob("task-1-*"))[0]
    session, _ = ended(fedlab.Run(last, {}))
    told = json.loads((last / "task.json").read_text())
    for task in (0, 1):
        data = session.data.at(task)
        wanted, trained_on = (primaries(session, data, held_out) for held_out in (True, False))
        assert wanted != trained_on, "here it makes a difference"
        assert told["clients"][task] == pytest.approx(wanted)
        assert told["pooled"][task] == pytest.approx(primary_score(session.model, data, data.test, session.config))
        assert not math.isnan(told["pooled"][task])
