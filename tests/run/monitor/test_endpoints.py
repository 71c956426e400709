"""The server's endpoint, and what a process needs that has none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from fedlab.run.monitor.endpoints import client_endpoint, server_endpoint


def test_a_server_is_seen_without_any_run(tmp_path: Path):
    problems: list[str] = []
    known = {"nodes_live": 2, "nodes_registered": 3, "restarts": {"flower-superlink": 1}, "requests": {"refused": 4}}
    with server_endpoint(
        "127.0.0.1:0", tmp_path / "none.json", lambda: known, lambda: problems[0] if problems else None
    ) as exporter:
        assert exporter is not None
        text = urlopen(f"http://{exporter.address}/metrics", timeout=10).read().decode()
        assert "fedlab_server_ready 1.0" in text
        assert "fedlab_server_nodes_live 2.0" in text
        assert 'fedlab_server_restarts_total{process="flower-superlink"} 1.0' in text
        assert 'fedlab_server_requests_total{result="refused"} 4.0' in text
        assert 'fedlab_run_status{status="none"} 1.0' in text
        assert "fedlab_server_certificate_expires" not in text, "what is not known is not shown"
        problems.append("flower-superlink does not answer")
        assert "fedlab_server_ready 0.0" in urlopen(f"http://{exporter.address}/metrics", timeout=10).read().decode()
        with pytest.raises(HTTPError) as error:
            urlopen(f"http://{exporter.address}/ready", timeout=10)
        assert (error.value.code, error.value.read()) == (503, b"not ready: flower-superlink does not answer\n")


def test_without_an_address_there_is_no_endpoint(tmp_path: Path):
    with (
        server_endpoint(None, tmp_path / "a", dict, lambda: None) as first,
        client_endpoint(None, tmp_path / "b") as second,
    ):
        assert (first, second) == (None, None)


def test_supervisors_load_neither_torch_nor_what_they_do_not_use():
    text = "import sys, fedlab.run.monitor.endpoints, fedlab.run.monitor.logs, fedlab.run.monitor.client as m\n"
    text += "print([x for x in ('torch', 'flwr', 'ray', 'prometheus_client', 'dp_accounting') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
