"""A run on a server: announced to its SuperLink, and executed here.

Flower wants an app to be bundled and uploaded, and runs it wherever an executor takes its task. Here the bundle is
empty but for the names of its two apps, which every party has installed; the task of the server's app is taken by this
very process, with the executor's secret, so that a run shows, writes and ends as a simulation does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import tomli_w
from flwr.app import Context
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from fedlab.config import RunConfig
from fedlab.config.server import ServerFile
from fedlab.errors import ConfigError, FedlabError, Interrupted, RunFailed
from fedlab.run import interrupt
from fedlab.run.deployment import Deployment
from fedlab.run.directory import RunDirectory
from fedlab.run.launch.deploy.grid import OUTAGE_SECONDS, DeployedGrid, ServerLost
from fedlab.run.launch.deploy.heartbeat import Heartbeat
from fedlab.run.launch.deploy.keys import SECRET
from fedlab.run.launch.deploy.superlink import Inner
from fedlab.run.launch.deploy.tasks import executor
from fedlab.run.launch.environment import without_proxy
from fedlab.run.launch.reference import CLIENT_APP, SERVER_APP
from fedlab.run.monitor import logs
from fedlab.run.monitor.endpoints import RUN_FILE
from fedlab.run.monitor.rounds import JSON, MONITOR
from fedlab.run.output import complain

SHIM = CLIENT_APP  # named because Flower wants a name: clients run no app that comes from a server
ACQUIRE_SECONDS = 30.0
ANSWER_SECONDS = 10.0
SUBMISSIONS = 10  # of one run, by one process
logger = logging.getLogger("fedlab")


def run_deployed(server_app: Any, client_app: Any, config: RunConfig, run_config: dict[str, Any]) -> None:
    """Run the server app in this thread over the clients of a server; its exceptions pass through.

    ``run_config["run-dir"]`` holds a ``deployment.json`` that names the server. ``client_app`` is not used: clients
    have their own. Where the server was away so long that it gave the run up, the run is submitted again when it is
    back, and goes on from its checkpoint.
    """
    del client_app, config
    deployment = Deployment.of(Path(run_config["run-dir"]))
    if deployment is None:
        raise ConfigError(f"{run_config['run-dir']} is not of a deployed run")
    inner, settings = inner_of(deployment), {**run_config, **_seen_from_outside(deployment)}
    for left in reversed(range(SUBMISSIONS)):
        try:
            with deployed_grid(inner) as (grid, context):
                context.run_config = settings
                server_app(grid, context)
            return
        except ServerLost as error:
            logger.warning("%s", error)
            if not left or not _back(inner):
                again = f"fedlab resume {shlex.quote(run_config['run-dir'])}"
                raise ServerLost(f"{error}, then continue with: {again}") from None
            complain(f"fedlab: {error}; it is there again, and the run goes on from its last round")


def _back(inner: Inner) -> bool:
    """Wait for a server that was lost; whether it came back."""
    deadline = time.monotonic() + OUTAGE_SECONDS
    while time.monotonic() < deadline:
        if inner.answers():
            return True
        interrupt.check()
        time.sleep(1)
    return False


def _seen_from_outside(deployment: Deployment) -> dict[str, Any]:
    """What the server's app is told of the server's endpoint and log; nothing where the server's file is not known."""
    if is_address(deployment.server):
        return {}
    file = ServerFile.load(deployment.server)
    logs.configure(file.log.format)
    return {MONITOR: str(file.state / RUN_FILE), JSON: file.log.format == "json"}


def deployment_of(server: str, keys: Path | None, rehearsal: bool = False) -> Deployment:
    """What a run directory says of a server that a person named.

    Args:
        server: the coordinator's file, or host:port of its inner port.
        keys: directory of keys; default: the file says it, or ``keys`` here.
        rehearsal: seeded noise is let through.

    Raises:
        ConfigError: there is no such file, or no run can be started from here.
    """
    place = str(keys.resolve()) if keys is not None else None
    if is_address(server):
        place = place or str(Path("keys").resolve())
        Inner.at(server, Path(place))
        return Deployment(server=server, keys=place, rehearsal=rehearsal)
    path = Path(server).resolve()
    file = ServerFile.load(path)
    Inner.at(file.inner_address, Path(place) if place else file.keys)
    return Deployment(
        server=str(path),
        keys=place,
        wait=file.rounds.wait,
        retries=file.rounds.retries,
        test=file.test,
        rehearsal=rehearsal,
    )


def place_of(deployment: Deployment, name: str) -> Path | None:
    """A new run directory where the server's file wants runs; None: where others go."""
    if is_address(deployment.server):
        return None
    return RunDirectory.new_place(ServerFile.load(deployment.server).runs, name)


def inner_of(deployment: Deployment) -> Inner:
    """How the server of a deployment is reached from here. Raises ConfigError."""
    if is_address(deployment.server):
        return Inner.at(deployment.server, Path(deployment.keys or "keys"))
    file = ServerFile.load(deployment.server)
    return Inner.at(file.inner_address, Path(deployment.keys) if deployment.keys else file.keys)


def is_address(server: str) -> bool:
    """Whether ``--server`` names a host and port, not a file."""
    return not server.endswith(".toml") and ":" in server and not Path(server).is_file()


@contextlib.contextmanager
def deployed_grid(inner: Inner, client_app: str = SHIM) -> Iterator[tuple[DeployedGrid, Context]]:
    """A run on a server, as long as it is open, and this process as the one that executes it.

    Args:
        inner: the server.
        client_app: ``module:attribute`` that its nodes run for each message; they have it installed.

    Yields:
        The grid, and the context of the server's app. When the block ends, the server is told how: completed, stopped
        by a signal, or failed.

    Raises:
        RunFailed: the server is not there, or does not let this process execute the run.
    """
    os.environ.update(without_proxy(os.environ))  # Flower's clients would ask a proxy for this machine
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what goes wrong is raised, and in the run's own log
    token = _submit(inner, client_app)
    grid = DeployedGrid(inner.address, inner.authority, token)
    outcome, details = SubStatus.FAILED, "failed"
    try:
        with Heartbeat(lambda: _runtime(inner, token)), contextlib.closing(grid):
            yield grid, _enter(grid)
        outcome, details = SubStatus.COMPLETED, ""
    except (KeyboardInterrupt, SystemExit, Interrupted):
        outcome, details = SubStatus.STOPPED, "interrupted"
        raise
    except FedlabError as error:
        details = error.code  # its text may name what nodes need not know
        raise
    finally:
        _finish(inner, token, outcome, details)


def make_bundle(client_app: str = SHIM) -> bytes:
    """What is uploaded: a ``pyproject.toml`` that names the apps, and nothing else.

    It holds no module: a package in it would take the place of the installed one of that name.
    """
    project = {
        "project": {"name": "fedlab-run", "version": "1.0.0", "description": "", "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedlab",
                    "components": {"serverapp": SERVER_APP, "clientapp": client_app},
                    "config": {},
                }
            }
        },
    }
    return build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})[0]


def _submit(inner: Inner, client_app: str) -> str:
    """Announce a run and take its task; the task's token. One process of this machine at a time, or two would take each
    other's.
    """
    bundle = make_bundle(client_app)
    request = StartRunRequest(fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})))
    with _turn(inner.keys / SECRET), _told(inner):
        with inner.control() as control:
            answer = control.StartRun(request)
        if not answer.HasField("run_id"):
            raise RunFailed(f"the server at {inner.address} did not take the run; see its log")
        return _acquire(inner, answer.run_id)


def _acquire(inner: Inner, run_id: int) -> str:
    """The token of a run's task. Tasks of others are those of processes that ended before they took them."""
    secret = executor((inner.keys / SECRET).read_bytes())
    deadline = time.monotonic() + ACQUIRE_SECONDS
    with _runtime(inner, None, secret) as client:
        while time.monotonic() < deadline:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if not found.HasField("task") or not found.token:
                time.sleep(0.1)
            elif found.task.run_id == run_id:
                return str(found.token)
            else:
                _finish(inner, found.token, SubStatus.FAILED, "abandoned")
    raise RunFailed(f"the server at {inner.address} gave the run's task to somebody else, or to nobody")


def _enter(grid: DeployedGrid) -> Context:
    """Begin the task: from here on the run is running."""
    given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
    TaskIdentity.node_id = given.context.node_id
    grid.set_run(run_from_proto(given.run))
    return context_from_proto(given.context)


def _finish(inner: Inner, token: str, outcome: str, details: str) -> None:
    """Tell the server how a task ended; if it is not there, it will notice itself that nobody speaks any more."""
    with contextlib.suppress(httpx.HTTPError), _runtime(inner, token) as client:
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=details))


def _runtime(inner: Inner, token: str | None, *more: Any) -> RuntimeHttpClient:
    """A client of the runtime interface that asks once."""
    given = [RuntimeTokenHttpInterceptor(token)] if token is not None else []
    return RuntimeHttpClient(
        f"https://{inner.address}",
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"), *given, *more],
        verify=inner.context,
        timeout=ANSWER_SECONDS,
    )


@contextlib.contextmanager
def _turn(secret: Path) -> Iterator[None]:
    """Wait for this process's turn among those that submit runs to one server."""
    descriptor = os.open(secret, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(inner: Inner) -> Iterator[None]:
    """What goes wrong before a run begins, in words."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code == 401:
            raise ConfigError(
                f"{inner.keys / SECRET} is not the secret of the server at {inner.address}; give its keys with --keys"
            ) from None
        raise RunFailed(f"the server at {inner.address} refused the run: {error.response.text[:200]}") from None
    except httpx.HTTPError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise ConfigError(
                f"the server at {inner.address} has a certificate of another authority than {inner.keys / 'ca.crt'};"
                " give its keys with --keys"
            ) from None
        raise RunFailed(f"no server answers at {inner.address}; start it with fedlab server SERVER.toml") from None
