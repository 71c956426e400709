"""A trainer of real processes, seen from outside before anybody asked it for anything."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from fedlab.run.monitor.endpoints import CLIENT_FILE, client_endpoint, client_problem

from .conftest import environment, wait_for

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
address = "127.0.0.1:9464"
[log]
format = "json"
"""


def test_a_trainer_shows_its_budget_and_says_nothing_but_objects(tmp_path: Path, tiny_data: Path, tiny_bert: Path):
    snapshot = tmp_path / "home" / CLIENT_FILE
    file = tmp_path / "client.toml"
    file.write_text(CLIENT.format(data=tiny_data, model=tiny_bert))
    command = [sys.executable, "-m", "fedlab.cli", "client", str(file), "--only", "trainer"]
    log = tmp_path / "out.txt"
    with log.open("w") as out_, (tmp_path / "errors.txt").open("w") as errors_:
        process = subprocess.Popen(command, stdout=out_, stderr=errors_, env=environment(tmp_path / "flower"))
    try:
        wait_for(lambda: client_problem(snapshot) is None or process.poll() is not None, 90, "a ready trainer")
        with client_endpoint("127.0.0.1:0", snapshot) as endpoint:
            assert endpoint is not None
            with urlopen(f"http://{endpoint.address}/metrics", timeout=20) as answer:
                text = answer.read().decode()
        wait_for(lambda: process.poll() is not None or log.read_text().count("ready, the trainer") == 1, 60, "its word")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    out, errors = log.read_text(), (tmp_path / "errors.txt").read_text()
    assert "fedlab_client_left_epsilon 40.0" in text, errors
    assert "fedlab_client_ready 1.0" in text
    told = [json.loads(line)["message"] for line in out.splitlines()]
    assert [message.partition(" at ")[0] for message in told] == [
        "the trainer listens",
        "fedlab client: north is ready, the trainer listens",
        "stopped",
    ]
    assert (process.returncode, errors) == (0, "")
