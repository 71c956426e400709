"""A client's own figures: they agree with its ledger, and are of nobody else's words."""

from __future__ import annotations

import logging
from pathlib import Path
from urllib.request import urlopen

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import PrivacyError
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.ledger.guard import affordable, spent_of_budget
from fedlab.protocol import encode
from fedlab.protocol.fields import Failure
from fedlab.protocol.messages import (
    NODE_FAILURE,
    ClientReply,
    DescribeReply,
    Enrolment,
    GramReply,
    NodeFailure,
    ReceiptsReply,
    TrainReply,
)
from fedlab.protocol.sum_messages import Revealed, UnmaskReply
from fedlab.run.monitor.client import ClientMonitor, failure_codes, ledger_epsilon
from fedlab.run.monitor.endpoints import client_endpoint, client_problem, client_values


def test_requests_and_refusals_are_counted_by_closed_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "monitor.json"
    assert client_problem(file) == "the trainer is not running"
    monitor = ClientMonitor("north", file)
    assert client_problem(file) == "the trainer has not opened its model and data yet"
    monitor.ready(True)
    assert client_problem(file) is None
    with caplog.at_level(logging.INFO, "fedlab.operations"):
        monitor.answered("train", 2.5, round_number=4)
        monitor.answered("train", 0.01, ["budget-exhausted"], 5)
        monitor.answered("describe", 0.2)
        monitor.answered("John Smith", 0.1, ["John Smith"])
    values = client_values(file)
    assert (values["rounds_answered"], values["requests"]["train"], values["requests"]["describe"]) == (1, 2, 1)
    assert (values["refusals"]["budget-exhausted"], values["refusals"]["failed"]) == (1, 1)
    assert values["request_seconds"] == {"train": 0.01, "describe": 0.2}
    assert "John" not in file.read_text() + caplog.text
    assert [record.getMessage() for record in caplog.records] == [
        "answered train (2.5 s)",
        "asked to train: budget-exhausted (0.0 s)",
        "answered describe (0.2 s)",
        "asked to something unknown: failed (0.1 s)",
    ]
    with client_endpoint("127.0.0.1:0", file, lambda: {"restarts": {"transport": 1}}) as exporter:
        assert exporter is not None
        text = urlopen(f"http://{exporter.address}/metrics", timeout=10).read().decode()
        assert 'fedlab_client_refusals_total{code="budget-exhausted"} 1.0' in text
        assert 'fedlab_client_restarts_total{process="transport"} 1.0' in text
        assert urlopen(f"http://{exporter.address}/ready", timeout=10).read() == b"ready\n"
    monitor.close()
    assert client_problem(file) == "the trainer is not running"
    assert (client_values(file)["up"], client_values(file)["ready"]) == (False, False)


def test_codes_are_taken_from_the_reply_itself(tmp_path: Path):
    refused, given = ClientReply("north", failure=Failure("policy", True)), ClientReply("north")
    replies: list[tuple[str, object, list[str]]] = [
        ("describe", DescribeReply((Enrolment(refused),), True), ["policy"]),
        ("train", TrainReply(1.0, 2.0, (given,)), []),
        ("train", TrainReply(1.0, 2.0, (refused, given)), ["policy"]),
        ("gram", GramReply(1.0, 2.0, (refused,), None), ["policy"]),
        ("receipts", ReceiptsReply((given,)), []),
        ("unmask", UnmaskReply((Revealed("north", failure=Failure("secure-sum")),)), ["secure-sum"]),
        (NODE_FAILURE, NodeFailure("request"), ["request"]),
    ]
    file = tmp_path / "monitor.json"
    monitor = ClientMonitor("north", file)
    for kind, reply, codes in replies:
        frame = encode(kind, reply)
        assert failure_codes(frame) == codes, kind
        monitor.replied([kind] if kind == NODE_FAILURE else kind, 0.1, frame)
    values = client_values(file)
    assert (values["rounds_answered"], values["refusals"]["policy"], values["refusals"]["request"]) == (1, 3, 1)
    monitor.close()


def test_what_is_left_of_the_budget_is_what_the_ledger_says(tiny_toml: str, tmp_path: Path):
    run = fedlab.simulate(RunConfig.parse(tiny_toml, ["run.rounds=2"]), tmp_path / "run", quiet=True)
    ledger, file = run.path / "ledger" / "client-0.jsonl", tmp_path / "monitor.json"
    delta, spent = (run.result["clients"]["client-0"][name] for name in ("delta", "epsilon"))
    assert ledger_epsilon(ledger, delta) == pytest.approx(spent, rel=0.01)
    with ledger.open("a") as half:
        half.write('{"type": "CHARGE"')  # is being written
    monitor = ClientMonitor("client-0", file)
    monitor.budget(8.0, delta, ledger)
    values = client_values(file)
    assert values["budget"] == 8.0
    assert values["left"] == pytest.approx(8.0 - values["spent"])
    monitor.budget(spent / 2, delta, ledger)
    assert client_values(file)["left"] == 0.0
    monitor.budget(None, delta, tmp_path / "none.jsonl")
    assert [client_values(file)[name] for name in ("budget", "spent", "left")] == [None, 0.0, None]
    monitor.close()


def test_a_ledger_that_is_none_shows_nothing_rather_than_a_full_budget(tmp_path: Path):
    ledger, file = tmp_path / "ledger.jsonl", tmp_path / "monitor.json"
    monitor = ClientMonitor("north", file)
    for text in ("nothing\n", "[]\n", '{"type": "CHARGE"}\n', '{"a": 1}\n'):
        ledger.write_text(text)
        with pytest.raises(PrivacyError):
            ledger_epsilon(ledger, 1e-5)
        monitor.budget(8.0, 1e-5, ledger)
        assert [client_values(file)[name] for name in ("budget", "spent", "left")] == [8.0, None, None]
    monitor.close()
    with pytest.raises(PrivacyError, match="cannot be read"):
        ledger_epsilon(tmp_path, 1e-5)


@pytest.mark.parametrize(
    "spent", [[Event("poisson", 0.1, 1.0, 30)], [Event("poisson", 0.1, 1.0, 30), Event("poisson", 0.2, 1.5, 10)]]
)
def test_what_is_shown_as_spent_is_what_a_budget_admits(spent: list[Event]):
    shown = spent_of_budget(spent, 1e-5)
    assert affordable(spent, shown * 1.0001, 1e-5)[0] is not None
    assert affordable(spent, shown * 0.98, 1e-5)[0] is None
    assert spent_of_budget([], 1e-5) == 0.0
    assert shown <= epsilon(spent, 1e-5, "rdp") * 1.0001
