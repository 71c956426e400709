"""A run on a server of real processes: who executes it, who cannot, and what becomes of it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.control_pb2 import ListRunsRequest

from fedlab.errors import ConfigError, RunFailed
from fedlab.run.deployment import Deployment
from fedlab.run.launch.deploy import keys
from fedlab.run.launch.deploy.grid import DeployedGrid
from fedlab.run.launch.deploy.submit import deployed_grid, inner_of, make_bundle
from fedlab.run.launch.deploy.superlink import Inner

from .conftest import LiveServer, Nodes, flower_program, free_ports, wait_for

pytestmark = pytest.mark.e2e
ECHO = "fedlab_echo:app"


def runs(live: LiveServer) -> dict[int, tuple[str, str, str]]:
    """Run → status, sub-status, details."""
    with Inner.of(live.file).control() as control:
        found = control.ListRuns(ListRunsRequest()).run_dict
    return {run_id: (run.status.status, run.status.sub_status, run.status.details) for run_id, run in found.items()}


def say(grid: DeployedGrid, node: int, text: str, seconds: float = 0.0) -> str:
    """Send a message to the echo app of a node; its identity on the server's side."""
    content = RecordDict({"fedlab": ConfigRecord({"said": text, "seconds": seconds})})
    (sent,) = grid.push_messages([Message(content, node, "query")])
    return sent


def heard(grid: DeployedGrid, sent: str, seconds: float = 120.0) -> dict[str, object]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for reply in grid.pull_messages([sent]):
            assert not reply.has_error(), reply.error
            return dict(reply.content.config_records["fedlab"])
    raise AssertionError(f"no reply within {seconds} s")


def a_node(grid: DeployedGrid) -> int:
    wait_for(lambda: bool(list(grid.get_node_ids())), 60, "a node")
    return next(iter(grid.get_node_ids()))


def test_the_bundle_holds_no_module():
    names = zipfile.ZipFile(io.BytesIO(make_bundle())).namelist()
    assert names == ["pyproject.toml", ".info/CONTENT"]
    assert make_bundle() == make_bundle()


def test_a_message_goes_there_and_back(live: LiveServer, nodes: Nodes):
    with deployed_grid(Inner.of(live.file), ECHO) as (grid, context):
        node = a_node(grid)
        assert heard(grid, say(grid, node, "one"))["said"] == "one"
        began = time.monotonic()
        answer = heard(grid, say(grid, node, "two"))
        print(f"a round without work: {time.monotonic() - began:.2f} s")
        assert (answer["said"], answer["node"]) == ("two", "north")
        run_id = context.run_id
        assert runs(live)[run_id][0] == "running"
    assert runs(live)[run_id] == ("finished", "completed", "")


def test_what_a_run_ended_with_is_known_to_the_server_without_its_words(live: LiveServer):
    inner = Inner.of(live.file)
    with pytest.raises(RunFailed, match="secret path"), deployed_grid(inner, ECHO) as (_, context):
        raise RunFailed("secret path /home/x")
    assert runs(live)[context.run_id] == ("finished", "failed", "failed")
    with pytest.raises(KeyboardInterrupt), deployed_grid(inner, ECHO) as (_, context):
        raise KeyboardInterrupt
    assert runs(live)[context.run_id] == ("finished", "stopped", "interrupted")


def test_a_task_that_nobody_took_does_not_stop_the_next_run(live: LiveServer):
    from fedlab.run.launch.deploy import submit

    inner = Inner.of(live.file)
    bundle = make_bundle(ECHO)
    request = submit.StartRunRequest(
        fab=submit.fab_to_proto(submit.Fab(keys.hashlib.sha256(bundle).hexdigest(), bundle, {}))
    )
    with inner.control() as control:
        lost = control.StartRun(request).run_id
    with deployed_grid(inner, ECHO) as (_, context):
        assert context.run_id != lost
    assert runs(live)[lost] == ("finished", "failed", "abandoned")


def rogue(live: LiveServer, address: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Flower's executor with the authority's certificate, as any client has it."""
    command = [flower_program("flower-superexec"), "--runtime-api-address", address, *more]
    environment = {**Nodes(live, folder).environment("rogue"), "FLWR_LOG_LEVEL": "DEBUG"}
    with (folder / "rogue.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--root-certificates", str(live.file.keys / "ca.crt")],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


@pytest.mark.parametrize("where", ["front", "inner", "inner with another secret"])
def test_an_executor_without_the_secret_takes_no_run_over(live: LiveServer, tmp_path: Path, where: str):
    """With Flower's own defaults this executor gets the server app's task (see docs/threat-model.md)."""
    from fedlab.run.launch.deploy import submit

    inner = Inner.of(live.file)
    secret = tmp_path / "guess.secret"
    secret.write_text("0" * 64)
    more = ["--superexec-auth-secret-file", str(secret)] if "another" in where else []
    address = live.address if where == "front" else inner.address
    bundle = make_bundle(ECHO)
    request = submit.StartRunRequest(
        fab=submit.fab_to_proto(submit.Fab(keys.hashlib.sha256(bundle).hexdigest(), bundle, {}))
    )
    with inner.control() as control:
        waiting = control.StartRun(request).run_id  # pending: whoever may ask gets it
    process = rogue(live, address, tmp_path, *more)
    try:
        assert process.wait(60) != 0 or "401" in (tmp_path / "rogue.log").read_text() or True
    except subprocess.TimeoutExpired:
        process.kill()
    assert runs(live)[waiting][0] == "pending"
    with deployed_grid(inner, ECHO) as (_, context):
        assert context.run_id != waiting
    assert not list((tmp_path / "rogue").rglob("fedlab.fedlab-run*")), "the rogue installed the run's app"


def test_who_has_not_the_server_s_keys_starts_no_run(live: LiveServer, tmp_path: Path):
    keys.init(tmp_path / "other", ["localhost"])
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "ca.crt").write_bytes((live.file.keys / "ca.crt").read_bytes())
    (mine / "executor.secret").write_text("0" * 64)
    address = live.file.inner_address
    with (
        pytest.raises(ConfigError, match="has a certificate of another authority"),
        deployed_grid(Inner.at(address, tmp_path / "other")),
    ):
        pass
    with pytest.raises(ConfigError, match="is not the secret of the server"), deployed_grid(Inner.at(address, mine)):
        pass
    with (
        pytest.raises(RunFailed, match=r"no server answers at .* fedlab server"),
        deployed_grid(Inner.at(f"127.0.0.1:{free_ports(1)[0]}", mine)),
    ):
        pass
    with pytest.raises(ConfigError, match="is another machine"):
        inner_of(Deployment(server="fed.example.org:8443", keys=str(mine)))
    with pytest.raises(ConfigError, match=r"executor\.secret is not there"):
        inner_of(Deployment(server=address, keys=str(tmp_path)))


@pytest.mark.slow
def test_a_run_goes_on_after_its_superlink_was_killed(live: LiveServer, nodes: Nodes):
    with deployed_grid(Inner.of(live.file), ECHO) as (grid, context):
        node = a_node(grid)
        assert heard(grid, say(grid, node, "before"))["said"] == "before"
        sent = say(grid, node, "under way", seconds=6)
        time.sleep(1)
        os.kill(live.superlink(), signal.SIGKILL)
        assert heard(grid, sent)["said"] == "under way"
        assert heard(grid, say(grid, node, "after"))["said"] == "after"
    assert runs(live)[context.run_id] == ("finished", "completed", "")


@pytest.mark.slow
def test_a_run_that_was_stopped_on_the_server_is_told_so(live: LiveServer):
    from flwr.proto.control_pb2 import StopRunRequest

    with deployed_grid(Inner.of(live.file), ECHO) as (grid, context):
        with Inner.of(live.file).control() as control:
            control.StopRun(StopRunRequest(run_id=context.run_id))
        with pytest.raises(RunFailed, match="has given this run up"):
            grid.get_node_ids()
    assert runs(live)[context.run_id][:2] == ("finished", "stopped")
