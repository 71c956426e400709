"""What a confined program can still do: run Python, write to its own directory, connect to a socket, no more."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedlab.run.launch.deploy import confine
from fedlab.run.launch.deploy.client import CONFINE, allowances

pytestmark = pytest.mark.skipif(confine.version() < 1, reason="this system has no Landlock (Linux 5.13)")
PROBE = """
import json, os, socket, sys
place, secret, own, trainer, outside = sys.argv[1:]
found = {}
def attempt(name, action):
    try:
        action(); found[name] = "done"
    except OSError as error:
        found[name] = error.strerror
attempt("record", lambda: open(secret).read())
attempt("listing", lambda: os.listdir(place))
attempt("writing", lambda: open(os.path.join(place, "planted"), "w"))
attempt("memory", lambda: open(f"/proc/{outside}/mem", "rb").read(1))
attempt("environment", lambda: open(f"/proc/{outside}/environ", "rb").read(1))
attempt("linking", lambda: os.link(secret, os.path.join(own, "link")))
attempt("own", lambda: open(os.path.join(own, "file"), "w").write("x"))
connection = socket.socket(socket.AF_UNIX)
attempt("trainer", lambda: connection.connect(trainer))
import hashlib, ssl, flwr.clientapp, fedlab.run.launch.deploy.carrier
found["carrier"] = "done"
json.dump(found, sys.stdout)
"""


def confined(tmp_path: Path, own: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    secret = tmp_path / "carrier.secret"
    secret.write_bytes(b"s")
    command = [sys.executable, "-I", "-S", str(CONFINE), json.dumps(allowances(own, secret)), sys.executable]
    return subprocess.run(
        [*command, "-c", PROBE, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ},
        check=False,
    )


def test_a_confined_program_reaches_the_trainer_and_no_file(tmp_path: Path):
    place, own = tmp_path / "home", tmp_path / "own"
    place.mkdir()
    own.mkdir()
    record, trainer = place / "records.csv", tmp_path / "trainer.sock"
    record.write_text("patient")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(trainer))
        listener.listen(1)
        threading.Thread(target=lambda: listener.accept(), daemon=True).start()
        done = confined(tmp_path, own, str(place), str(record), str(own), str(trainer), str(os.getpid()))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name: found.pop(name) for name in ("own", "trainer", "carrier")} == dict.fromkeys(
        ("own", "trainer", "carrier"), "done"
    )
    assert len(found) == 6
    assert "done" not in found.values(), found
    assert list(place.iterdir()) == [record]


def test_what_cannot_be_confined_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(confine, "version", lambda: 0)
    with pytest.raises(OSError, match="no Landlock"):
        confine.confine({"read": [], "list": [], "write": []})
