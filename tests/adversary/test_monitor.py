"""What a deployed client shows of itself: its budget as its ledger has it, and nothing that one record decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlab.config import RunConfig
from fedlab.protocol import encode
from fedlab.run.monitor.client import ClientMonitor
from fedlab.run.monitor.endpoints import CLIENT_FILE, client_values

MEASURED = ("request_seconds", "last_request")  # clocks


def answered(server: Any, config: RunConfig, helpers: Any) -> dict[str, Any]:
    """What a client shows after a description, a round, and a request that its policy does not allow."""
    monitor = ClientMonitor.of(server.file)
    monitor.look_up(server.file)
    requests = helpers.requests_of(config, config)
    for kind in ("describe", "train", "evaluate"):
        monitor.replied(kind, 0.5, encode(kind, server.send(requests[kind])))
        monitor.look_up(server.file)
    values = client_values(server.file.socket.with_name(CLIENT_FILE))
    monitor.close()
    return values


def test_a_client_shows_what_its_ledger_has(server: Callable[..., Any], tiny_toml: str, helpers: Any):
    client = server({"[budget]": '[metrics]\naddress = "127.0.0.1:0"\n[budget]'})
    values = answered(client, helpers.config_of(tiny_toml), helpers)
    assert (values["rounds_answered"], values["requests"]["train"], values["refusals"]["policy"]) == (1, 1, 1)
    assert values["budget"] == 40.0
    assert 0 < values["spent"] < 40.0
    assert values["left"] == pytest.approx(40.0 - values["spent"])
    assert [entry["type"] for entry in client.entries if entry["type"] in ("CHARGE", "COMMIT")] == ["CHARGE", "COMMIT"]


def test_one_record_more_or_less_of_another_text_changes_no_figure(
    server: Callable[..., Any], tiny_data: Path, tiny_toml: str, tmp_path: Path, helpers: Any
):
    lines = tiny_data.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*lines[:-1], '{"text": "John Smith", "topic": "metal", "site": "site0"}']) + "\n")
    shown = []
    for data in (tiny_data, other):
        home = tmp_path / data.stem
        changes = {str(tiny_data): str(data), f'home = "{tmp_path}"': f'home = "{home}"'}
        client = server({**changes, "[budget]": '[metrics]\naddress = "127.0.0.1:0"\n[budget]'})
        values = answered(client, helpers.config_of(tiny_toml), helpers)
        shown.append({key: value for key, value in values.items() if key not in MEASURED})
    assert shown[0] == shown[1]


def test_without_an_endpoint_no_file_is_written(server: Callable[..., Any], tiny_toml: str, helpers: Any):
    client = server()
    monitor = ClientMonitor.of(client.file)
    monitor.ready(True)
    monitor.close()
    assert not client.file.socket.with_name(CLIENT_FILE).exists()
