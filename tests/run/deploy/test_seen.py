"""A server of real processes, seen from outside: its figures, and its log lines as objects."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import httpx
import pytest

from fedlab.run.launch.deploy import certificates, keys
from fedlab.run.launch.deploy.superlink import Inner

from .conftest import LiveServer, Nodes, free_ports, make_folder, start_server, wait_for

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[LiveServer]:
    """A server with an endpoint, whose log is for machines."""
    folder = make_folder(tmp_path_factory.mktemp("seen"))
    with (folder / "server.toml").open("a") as file:
        file.write(f'[metrics]\naddress = "127.0.0.1:{port}"\n[log]\nformat = "json"\n')
    found = start_server(folder)
    yield found
    if found.process.poll() is None:
        found.stop()


def figures(port: int) -> dict[str, float]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_what_a_server_shows(live: LiveServer, nodes: Nodes, port: int, tmp_path: Path):
    first = figures(port)
    assert first["fedlab_server_ready"] == first["fedlab_server_nodes_registered"] == 1
    until = first["fedlab_server_certificate_expires_timestamp_seconds"]
    assert until == pytest.approx(certificates.read_certificate(live.file.keys / keys.SERVER).until.timestamp())
    assert first['fedlab_run_status{status="none"}'] == 1
    assert first['fedlab_server_restarts_total{process="flower-superlink"}'] == 0
    refused = first['fedlab_server_requests_total{result="refused"}']
    address, context = live.address, Inner.of(live.file).context
    httpx.post(f"https://{address}/v1/control/list-runs", verify=context, trust_env=False)
    assert figures(port)['fedlab_server_requests_total{result="refused"}'] == refused + 1
    wait_for(lambda: figures(port)["fedlab_server_nodes_live"] == 1, 60, "north connected")
    assert figures(port)['fedlab_server_requests_total{result="passed"}'] > 0
    keys.add_node(live.file.keys, keys.make_node("south", tmp_path)[1])
    wait_for(lambda: figures(port)["fedlab_server_nodes_registered"] == 2, what="south let in")
    with urlopen(f"http://127.0.0.1:{port}/ready", timeout=20) as answer:
        assert answer.read() == b"ready\n"


@pytest.mark.slow
def test_a_part_that_died_is_counted_and_every_line_is_an_object(live: LiveServer, port: int):
    os.kill(live.superlink(), signal.SIGKILL)
    wait_for(
        lambda: figures(port)['fedlab_server_restarts_total{process="flower-superlink"}'] == 1, 60, "another start"
    )
    wait_for(lambda: figures(port)["fedlab_server_ready"] == 1, 60, "a ready server")
    assert live.stop() == 0
    lines = [json.loads(line) for line in live.output.splitlines()]
    told = [line["message"] for line in lines]
    assert told[0].startswith("fedlab server: ready on 127.0.0.1:")
    assert any("was ended by SIGKILL" in message for message in told)
    assert told[-1] == "stopped"
    assert [line["client"] for line in lines if "client" in line] in ([], ["south"])
