"""A run on a server of real processes: who executes it, who cannot, and what becomes of it."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import statistics
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.supercore.fab import Fab

from fedlab.errors import ConfigError, RunFailed
from fedlab.run.deployment import Deployment
from fedlab.run.launch.deploy import keys, submit
from fedlab.run.launch.deploy.grid import DeployedGrid
from fedlab.run.launch.deploy.submit import deployed_grid, inner_of, make_bundle, run_deployed
from fedlab.run.launch.deploy.superlink import Inner

from .conftest import ECHO_APP as ECHO
from .conftest import LiveServer, Nodes, flower_program, free_ports, make_folder, start_server, wait_for

pytestmark = pytest.mark.e2e


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
        first = heard(grid, say(grid, node, "one"))
        second = heard(grid, say(grid, node, "two"))
        assert (first["said"], second["said"], second["node"]) == ("one", "two", "north")
        assert first["pid"] == second["pid"], "a message costs no process"
        run_id = context.run_id
        assert runs(live)[run_id][0] == "running"
    assert runs(live)[run_id] == ("finished", "completed", "")


EVIL = """
from pathlib import Path
Path({mark!r}).write_text("here")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


def test_a_bundle_with_code_in_it_is_neither_installed_nor_run(
    live: LiveServer, nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mark = tmp_path / "mark"

    def hostile(client_app: str) -> bytes:
        project = (
            '[project]\nname = "x"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "x"\n[tool.flwr.app.components]\n'
            'serverapp = "evil:app"\nclientapp = "evil:app"\n[tool.flwr.app.config]\n'
        )
        module = EVIL.format(mark=str(mark)).encode()
        files = {"pyproject.toml": project.encode(), "evil.py": module, "fedlab_echo.py": module}
        return build_fab_from_files(files)[0]

    monkeypatch.setattr(submit, "make_bundle", hostile)
    with deployed_grid(Inner.of(live.file)) as (grid, _):
        assert heard(grid, say(grid, a_node(grid), "still me"))["said"] == "still me"
    assert not mark.exists()
    assert not list(nodes.folder.rglob("evil*"))


@pytest.mark.slow
def test_what_a_round_costs(live: LiveServer, nodes: Nodes, tmp_path: Path):
    """Prints the floor: messages without work, with this executor and with Flower's own."""
    keys.add_node(live.folder / "keys", keys.make_node("slow", tmp_path)[1])
    nodes.start("slow", tmp_path / "slow.key", flower=True)
    with deployed_grid(Inner.of(live.file), ECHO) as (grid, _):
        wait_for(lambda: len(list(grid.get_node_ids())) == 2, 60, "both nodes")
        took: dict[str, list[float]] = {}
        for node in list(grid.get_node_ids()) * 6:
            began = time.monotonic()
            name = str(heard(grid, say(grid, node, "x"))["node"])
            took.setdefault(name, []).append(time.monotonic() - began)
    for name, seconds in took.items():
        print(f"{name}: " + " ".join(f"{one:.1f}" for one in sorted(seconds)))
    assert statistics.median(took["north"]) < statistics.median(took["slow"])


def test_what_a_run_ended_with_is_known_to_the_server_without_its_words(live: LiveServer):
    inner = Inner.of(live.file)
    with pytest.raises(RunFailed, match="secret path"), deployed_grid(inner, ECHO) as (_, context):
        raise RunFailed("secret path /home/x")
    assert runs(live)[context.run_id] == ("finished", "failed", "failed")
    with pytest.raises(KeyboardInterrupt), deployed_grid(inner, ECHO) as (_, context):
        raise KeyboardInterrupt
    assert runs(live)[context.run_id] == ("finished", "stopped", "interrupted")


def rogue(live: LiveServer, address: str, folder: Path, secret: bytes | None) -> str:
    """What becomes of Flower's executor at an address, with the authority's certificate, as any client has it."""
    command = [flower_program("flower-superexec"), "--runtime-api-address", address]
    command += ["--root-certificates", str(live.file.keys / "ca.crt")]
    if secret is not None:
        (folder / "guess.secret").write_bytes(secret)
        command += ["--superexec-auth-secret-file", str(folder / "guess.secret")]
    with (folder / "rogue.log").open("ab") as log:
        environment = Nodes(live, folder).environment("rogue")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return (folder / "rogue.log").read_text(encoding="utf-8")


def announce(inner: Inner) -> int:
    """A run whose task nobody has taken yet: whoever may ask for it gets it."""
    bundle = make_bundle(ECHO)
    request = StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})))
    with inner.control() as control:
        return int(control.StartRun(request).run_id)


def test_a_task_that_nobody_took_does_not_stop_the_next_run(live: LiveServer):
    inner = Inner.of(live.file)
    lost = announce(inner)
    with deployed_grid(inner, ECHO) as (_, context):
        assert context.run_id != lost
    assert runs(live)[lost] == ("finished", "failed", "abandoned")


@pytest.mark.parametrize(
    "where", ["front", pytest.param("inner", marks=pytest.mark.slow), pytest.param("guess", marks=pytest.mark.slow)]
)
def test_an_executor_without_the_secret_takes_no_run_over(live: LiveServer, tmp_path: Path, where: str):
    """With Flower's own defaults it does: whoever holds the authority's certificate gets the server app's task."""
    inner = Inner.of(live.file)
    waiting = announce(inner)
    told = rogue(
        live, live.address if where == "front" else inner.address, tmp_path, b"0" * 64 if "guess" in where else None
    )
    assert "404 Not Found" in told or "terminated" in told, told
    assert runs(live)[waiting][0] == "pending"
    assert not list(tmp_path.rglob("fedlab.fedlab-run*")), "it installed the run's app"
    with deployed_grid(inner, ECHO):
        assert runs(live)[waiting] == ("finished", "failed", "abandoned")


@pytest.mark.slow
def test_with_the_secret_it_would(live: LiveServer, tmp_path: Path):
    """The test above tells something: this executor is kept out by the secret and nothing else."""
    inner = Inner.of(live.file)
    waiting = announce(inner)
    rogue(live, inner.address, tmp_path, (live.file.keys / "executor.secret").read_bytes())
    assert runs(live)[waiting][0] != "pending"


def test_a_run_that_the_server_gave_up_is_submitted_again(live: LiveServer, tmp_path: Path):
    (tmp_path / "run").mkdir()
    Deployment(server=str(live.folder / "server.toml")).write(tmp_path / "run")
    seen: list[int] = []

    def server_app(grid: DeployedGrid, context: Context) -> None:
        seen.append(context.run_id)
        if len(seen) == 1:
            with Inner.of(live.file).control() as control:
                control.StopRun(StopRunRequest(run_id=context.run_id))
        grid.get_node_ids()

    run_deployed(server_app, None, None, {"run-dir": str(tmp_path / "run"), "quiet": True})  # type: ignore[arg-type]
    assert len(set(seen)) == 2
    assert runs(live)[seen[1]] == ("finished", "completed", "")


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
    with pytest.raises(ConfigError, match=r"ca\.crt is not there; give .* --keys"):
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
def test_a_run_goes_on_after_its_whole_server_was_killed(tmp_path: Path):
    live = start_server(make_folder(tmp_path))
    nodes = Nodes(live, tmp_path)
    nodes.start("north", tmp_path / "north.key")
    try:
        with deployed_grid(Inner.of(live.file), ECHO) as (grid, context):
            sent = say(grid, a_node(grid), "under way", seconds=5)
            time.sleep(4)
            live.process.kill()
            live.process.wait()
            live = start_server(tmp_path)
            assert heard(grid, sent)["said"] == "under way"
            assert heard(grid, say(grid, a_node(grid), "after"))["said"] == "after"
        assert runs(live)[context.run_id] == ("finished", "completed", "")
    finally:
        nodes.stop()
        live.stop()


@pytest.mark.slow
def test_a_run_that_was_stopped_on_the_server_is_told_so(live: LiveServer):
    with deployed_grid(Inner.of(live.file), ECHO) as (grid, context):
        with Inner.of(live.file).control() as control:
            control.StopRun(StopRunRequest(run_id=context.run_id))
        with pytest.raises(RunFailed, match="has given this run up"):
            grid.get_node_ids()
    assert runs(live)[context.run_id][:2] == ("finished", "stopped")
