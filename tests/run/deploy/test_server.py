"""``fedlab server`` as people start it: real processes on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from fedlab.run.launch.deploy import certificates, keys
from fedlab.run.launch.deploy.superlink import Inner, known_nodes

from .conftest import LiveServer, environment, free_ports, make_folder, start_server, wait_for

pytestmark = pytest.mark.e2e


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedlab.cli", *words],
        cwd=folder,
        env=environment(folder / "home"),
        capture_output=True,
        text=True,
        timeout=60,
    )


def outside(live: LiveServer, method: str, path: str) -> int:
    context = Inner.of(live.file).context
    return httpx.request(method, f"https://{live.address}{path}", verify=context, trust_env=False).status_code


def node(live: LiveServer, key: Path, ca: Path, home: Path) -> subprocess.Popen[str]:
    """Flower's own SuperNode, as anybody could start it."""
    flower = Path(sys.executable).parent / "flower-supernode"
    return subprocess.Popen(
        [
            str(flower),
            *("--superlink", live.address.replace("127.0.0.1", "localhost"), "--root-certificates", str(ca)),
            *("--auth-supernode-private-key", str(key), "--isolation", "process", "--port", str(free_ports(1)[0])),
        ],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_it_says_that_it_is_ready_and_answers(live: LiveServer):
    assert "fedlab server: ready on 127.0.0.1:" in live.output
    assert "1 node let in" in live.output
    assert outside(live, "GET", "/health") == 200
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/docs", "/v1/fleet/register-node"):
        assert outside(live, "POST", path) == 404


def test_nodes_come_and_go_while_it_runs(live: LiveServer, tmp_path: Path):
    inner = Inner.of(live.file)
    assert len(known_nodes(inner)) == 1
    _, public = keys.make_node("south", tmp_path)
    assert command(live.folder, "keys", "add", "keys", str(public)).returncode == 0
    wait_for(lambda: len(known_nodes(inner)) == 2, what="south let in")
    assert command(live.folder, "keys", "remove", "keys", "south").returncode == 0
    wait_for(lambda: len(known_nodes(inner)) == 1, what="south shut out")
    assert "let in: south" in live.output
    assert "shut out: 1 node" in live.output


def test_an_unknown_node_is_refused_and_named_by_its_fingerprint(live: LiveServer, tmp_path: Path):
    private, public = keys.make_node("rogue", tmp_path)
    process = node(live, private, live.file.keys / "ca.crt", tmp_path / "home")
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "the server does not let this node in" in out
    told = f"a node with an unknown key {keys.fingerprint(keys.read_public_key(public))}"
    wait_for(lambda: told in live.output, what="the refusal told")


def test_a_file_that_is_no_key_shuts_nobody_else_out_or_in(live: LiveServer, tmp_path: Path):
    inner, folder = Inner.of(live.file), live.file.keys / "nodes"
    keys.add_node(live.file.keys, keys.make_node("west", tmp_path)[1])
    wait_for(lambda: len(known_nodes(inner)) == 2, what="west let in")
    (folder / "broken.pub").write_text("half a ke")
    (folder / "west.pub").unlink()
    wait_for(lambda: len(known_nodes(inner)) == 1, what="west shut out")
    assert live.output.count("broken.pub' is no public key") == 1
    (folder / "broken.pub").unlink()


@pytest.mark.slow
def test_a_renewed_certificate_is_shown_without_a_restart(live: LiveServer):
    def shown() -> bytes:
        host, _, port = live.address.rpartition(":")
        return ssl.get_server_certificate((host, int(port))).encode()

    before, link = shown(), live.superlink()
    assert command(live.folder, "keys", "renew", "keys", "--days", "99").returncode == 0
    wait_for(lambda: shown() != before, what="the new certificate")
    assert shown().strip() == (live.file.keys / "server.crt").read_bytes().strip()
    inner = Inner.of(live.file)
    wait_for(lambda: live.superlink() not in (0, link) and inner.answers(), 90, "another SuperLink")


@pytest.mark.slow
def test_a_killed_superlink_is_started_again_with_its_nodes(live: LiveServer):
    inner, link = Inner.of(live.file), live.superlink()
    os.kill(link, signal.SIGKILL)
    wait_for(lambda: "flower-superlink was ended by SIGKILL" in live.output, what="the end told")
    wait_for(lambda: live.superlink() not in (0, link) and inner.answers(), 90, "another SuperLink")
    assert len(known_nodes(inner)) == 1
    wait_for(lambda: outside(live, "GET", "/health") == 200, what="health")


def test_a_second_server_in_the_same_place_is_refused(live: LiveServer):
    done = command(live.folder, "server", "server.toml")
    assert done.returncode == 2
    assert "is in use by another server" in done.stderr


@pytest.mark.slow
def test_it_ends_well_and_remembers(tmp_path: Path):
    live = start_server(make_folder(tmp_path))
    link = live.superlink()
    before = known_nodes(Inner.of(live.file))
    assert live.stop() == 0
    assert live.output.endswith("stopped\n")
    assert not Path(f"/proc/{link}").exists()
    assert (tmp_path / "state" / "superlink.db").stat().st_mode & 0o077 == 0
    again = start_server(tmp_path)
    assert known_nodes(Inner.of(again.file)) == before
    link = again.superlink()
    again.process.kill()  # no time to stop anything
    again.process.wait()
    wait_for(lambda: not Path(f"/proc/{link}").exists(), what="the SuperLink's end")


@pytest.mark.slow
def test_what_cannot_work_is_told_before_anything_starts(tmp_path: Path):
    make_folder(tmp_path)
    authority = certificates.read_certificate(tmp_path / "keys" / "ca.crt").certificate
    ca_key, key = (certificates.read_private_key(tmp_path / "keys" / name) for name in ("ca.key", "server.key"))
    past = datetime.now(UTC) - timedelta(days=20)
    made = certificates.make_server_certificate(authority, ca_key, key, ["localhost"], 10, past)
    (tmp_path / "keys" / "server.crt").write_bytes(made)
    done = command(tmp_path, "server", "server.toml")
    assert done.returncode == 2
    assert "has expired on" in done.stderr
    assert "fedlab keys renew" in done.stderr
    keys.init(tmp_path / "other", ["localhost"])
    shutil.copy(tmp_path / "other" / "ca.crt", tmp_path / "keys" / "ca.crt")
    done = command(tmp_path, "server", "--check", "server.toml")
    assert (done.returncode, "fedlab keys" in done.stderr) == (2, True)
    assert not (tmp_path / "state").exists()
