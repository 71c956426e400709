"""``fedlab run`` with a server and clients of real processes: it ends, it resumes, and no failure exits with 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlab.run.launch.deploy import keys

from .conftest import LABELS, OWN_FILE, LiveServer, environment, make_folder, start_server, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
CLIENTS = ("north", "south")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_data: Path) -> Iterator[LiveServer]:
    """A server and two clients with different data."""
    folder = make_folder(tmp_path_factory.mktemp("house"))
    keys.add_node(folder / "keys", keys.make_node("south", folder)[1])
    live = start_server(folder)
    lines = tiny_data.read_text(encoding="utf-8").splitlines()
    processes = []
    try:
        for i, name in enumerate(CLIENTS):
            (folder / f"{name}.jsonl").write_text("\n".join(lines[i::3]), encoding="utf-8")
            (folder / f"{name}.toml").write_text(
                OWN_FILE.format(
                    name=name,
                    server=live.address,
                    ca=folder / "keys" / "ca.crt",
                    key=folder / f"{name}.key",
                    home=folder / f"home-{name}",
                    data=folder / f"{name}.jsonl",
                    model=tiny_bert,
                ),
                encoding="utf-8",
            )
            with (folder / f"{name}.out").open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "fedlab.cli", "client", str(folder / f"{name}.toml")],
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environment(folder / "unused"),
                    )
                )
        for name in CLIENTS:
            wait_for(lambda name=name: "is ready" in (folder / f"{name}.out").read_text(), 90, f"{name} ready")
        yield live
    finally:
        for process in processes:
            process.terminate()
        live.stop()
        for process in processes:
            process.wait(60)


def settings(*more: str) -> list[str]:
    given = ["data.clients=2", "run.min_clients=2", "privacy.noise=secure", "evaluate.clients=never"]
    given += [f"objective.labels={json.dumps(LABELS)}", *more]
    return [word for one in given for word in ("--set", one)]


def fedlab(live: LiveServer, *words: str) -> subprocess.Popen[str]:
    """A command in the coordinator's folder; whatever becomes of the test, it ends with the server."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlab.cli", *words],
        cwd=live.folder,
        env=environment(live.folder / "run-home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    live.beside.append(process)
    return process


def test_a_run_goes_to_its_end_and_looks_like_a_simulation_s(house: LiveServer, tiny_toml: str):
    (house.folder / "run.toml").write_text(tiny_toml, encoding="utf-8")
    process = fedlab(house, "run", "run.toml", "--server", "server.toml", "--out", "first", *settings("run.rounds=2"))
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    run = house.folder / "first"
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed"
    assert set(result["clients"]) == set(CLIENTS)
    assert json.loads((run / "deployment.json").read_text())["server"] == str(house.folder / "server.toml")
    assert (run / "adapter").is_dir()
    assert json.loads((house.folder / "state" / "run.monitor.json").read_text())
    audit = fedlab(house, "audit", "first")
    out, err = audit.communicate(timeout=60)
    assert audit.returncode in (0, 5), out + err
    again = fedlab(house, "resume", "first")
    assert again.communicate(timeout=60)[1].strip().endswith("there is nothing to resume")
    assert again.returncode == 2


def test_a_killed_run_resumes_and_an_interrupted_one_exits_130(house: LiveServer, tiny_toml: str):
    (house.folder / "run.toml").write_text(tiny_toml, encoding="utf-8")
    words = ("run", "run.toml", "--server", "server.toml", "--out", "second", *settings("run.rounds=3"))
    process = fedlab(house, *words)
    metrics = house.folder / "second" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and '"phase": "train"' in metrics.read_text(), 300, "a round")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = metrics.read_text().count('"phase": "train"')
    process = fedlab(house, "resume", "second")
    wait_for(lambda: metrics.read_text().count('"phase": "train"') > before, 240, "a round of the resumed run")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=400)
    if process.returncode == 130:  # else it was done before
        assert "continue with: fedlab resume" in err
        process = fedlab(house, "resume", "second")
        _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert json.loads((house.folder / "second" / "result.json").read_text())["status"] == "completed"


def test_a_run_whose_app_fails_does_not_exit_0(house: LiveServer, tiny_toml: str):
    (house.folder / "run.toml").write_text(tiny_toml, encoding="utf-8")
    words = ("run", "run.toml", "--server", "server.toml", "--out", "third", *settings("privacy.noise=seeded"))
    process = fedlab(house, *words)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 3, err
    assert "on machines of their own" in err
