"""A trainer of real processes, seen from outside before anybody asked it for anything."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from .conftest import environment, free_ports, wait_for

pytestmark = pytest.mark.e2e
CLIENT = """
[client]
id = "north"
home = "home"
[data]
path = "{data}"
text = "text"
label = "topic"
[models."{model}"]
[policy]
max_epsilon = 30.0
[budget]
epsilon = 40.0
[metrics]
address = "127.0.0.1:{port}"
[log]
format = "json"
"""


def page(port: int, path: str) -> str:
    try:
        with urlopen(f"http://127.0.0.1:{port}/{path}", timeout=20) as answer:
            return str(answer.read().decode())
    except URLError:
        return ""


def test_a_trainer_shows_its_budget_and_says_nothing_but_objects(tmp_path: Path, tiny_data: Path, tiny_bert: Path):
    (port,) = free_ports(1)
    file = tmp_path / "client.toml"
    file.write_text(CLIENT.format(data=tiny_data, model=tiny_bert, port=port))
    command = [sys.executable, "-m", "fedlab.cli", "client", str(file), "--only", "trainer"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path / "flower"), text=True
    )
    try:
        wait_for(lambda: page(port, "ready") == "ready\n" or process.poll() is not None, 90, "a ready trainer")
        text = page(port, "metrics")
    finally:
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    assert "fedlab_client_left_epsilon 40.0" in text, errors
    assert 'fedlab_client_restarts_total{process="trainer"} 0.0' in text
    told = [json.loads(line)["message"] for line in out.splitlines()]
    assert [message.partition(" at ")[0] for message in told] == [
        "the trainer listens",
        "fedlab client: north is ready, the trainer listens",
        "stopped",
    ]
    assert (process.returncode, errors) == (0, "")
