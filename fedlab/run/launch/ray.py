"""The Ray backend: Flower's simulation runtime, with what it lacks.

Flower's own ``run_simulation`` is deprecated, hides a server app's exception, and never replaces an actor that died:
the dead one stays on top of its pool and swallows the work. Here the server app runs in the calling thread (so Ctrl-C
and exceptions arrive where they should), nodes are registered before it starts, and a lost actor is replaced and its
message tried once more.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import RUN_ID_NUM_BYTES, SUPERLINK_NODE_ID, TASK_ID_NUM_BYTES
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
from flwr.server.superlink.linkstate.utils import generate_rand_int_from_bytes
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid
from ray.exceptions import RayError, RayTaskError

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, RunFailed
from fedlab.run import interrupt
from fedlab.run.launch.simulated import SIMULATED

logger = logging.getLogger("fedlab")


class NodeLost(RuntimeError):
    """The process that served a node died (killed, out of memory)."""


class ResilientRayBackend(RayBackend):
    """Flower's Ray backend with as many actors as nodes can use, dead ones replaced, and a life beyond one run."""

    def __init__(self, backend_config: dict[str, Any], max_actors: int) -> None:
        super().__init__(backend_config)
        self._max_actors = max_actors
        self.retry = True
        self.resting = False  # between two runs: nothing is asked of it, and Flower's end of a run does not end it
        self._lock = threading.Lock()
        self._stopping = False
        self._actors: list[Any] = []

    def build(self, app_fn: Any) -> None:
        if self.pool is not None:  # it served another run before
            self.app_fn = app_fn
            return
        super().build(app_fn)
        assert self.pool is not None
        while self.pool.num_actors > self._max_actors:
            ray.kill(self.pool.pool.pop())
            self.pool.num_actors -= 1
        self._actors = list(self.pool.pool)

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Run one message on an idle actor. A lost actor is replaced; the message is retried once, unless noise is
        secret.

        With seeded noise a retry repeats the same bits, so it releases nothing new; with secure noise it would be
        another release.
        """
        pool: Any = self.pool
        assert pool is not None
        for attempt in (1, 2):
            with self._lock:
                if self._stopping:
                    raise NodeLost("the run is over")
                actor: Any = pool.pool.pop()
                result = actor.run.remote(self.app_fn, message, str(message.metadata.dst_node_id), context)
            try:
                _, reply, updated = ray.get(result)
                return reply, updated
            except RayTaskError:
                raise  # the app itself raised: the node is fine
            except RayError as error:
                if self._stopping:
                    raise NodeLost("the run is over") from None
                logger.warning("a node process died (%s); it is replaced", type(error).__name__)
                with self._lock:
                    self._actors.remove(actor)
                    actor = pool.create_actor_fn()
                    self._actors.append(actor)
                if attempt == 2 or not self.retry:
                    raise NodeLost("its process died" + (" twice" if attempt == 2 else "")) from error
            finally:
                with self._lock:
                    pool.pool.append(actor)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Kill every actor, also those at work, so that nothing waits for them."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            for actor in self._actors:
                ray.kill(actor)
            ray.shutdown()

    def terminate(self) -> None:
        """Called by Flower when its loop ends."""
        if not self.resting:
            self.stop()


class _Kept:
    """The backend that the next run may use, and what it was started for."""

    def __init__(self) -> None:
        self.wanted = False
        self.backend: ResilientRayBackend | None = None
        self.terms: tuple[Any, ...] = ()

    def drop(self) -> None:
        if self.backend is not None:
            self.backend.stop()
        self.backend = None


_kept = _Kept()


@contextmanager
def keep_ray() -> Iterator[None]:
    """While it is open, runs that need the same Ray (nodes, resources) use one, with its processes and the models that
    they loaded.
    """
    _kept.wanted = True
    try:
        yield
    finally:
        _kept.wanted = False
        _kept.drop()


def run_ray(server_app: Any, client_app: Any, config: RunConfig, run_config: dict[str, Any]) -> None:
    """Run the server app in this thread over Ray-simulated nodes; its exceptions pass through, and no process is left
    behind.
    """
    logging.getLogger("flwr").setLevel(
        logging.CRITICAL
    )  # what goes wrong reaches the run's own log, with the round it belongs to
    state_factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    run = _register_run(state_factory)
    grid = InMemoryGrid(state_factory=state_factory, pull_interval=0.02)
    grid.set_run(run)
    mapping = vce_api._register_nodes(config.run.nodes, state_factory)
    stores = vce_api._register_node_info_stores(mapping, run)
    for store in stores.values():
        store.node_config[SIMULATED] = store.retrieve_context(run.run_id).node_config[SIMULATED] = True
    backend = _backend(config)
    stop, crash = threading.Event(), list[BaseException]()

    def fleet() -> None:
        try:
            vce_api.run_api(lambda: client_app, lambda: backend, mapping, state_factory, stores, stop, VceMetrics())
        except BaseException as error:
            crash.append(error)

    thread = threading.Thread(target=fleet, name="fleet", daemon=True)
    thread.start()
    try:
        server_app(grid, Context(run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), run_config))
        backend.resting = _kept.wanted
    except BaseException as error:
        if crash and not isinstance(error, KeyboardInterrupt):
            raise RunFailed(f"Flower's simulation runtime crashed: {crash[0]}") from crash[0]
        raise
    finally:
        stop.set()
        if not backend.resting:
            backend.stop()
        thread.join(timeout=30)
        if (
            not backend.resting or thread.is_alive()
        ):  # something still works at a message: it must not meet the next run
            _kept.backend = None
            backend.stop()


def _backend(config: RunConfig) -> ResilientRayBackend:
    """A new backend, or the kept one if it fits."""
    run = config.run
    terms = (run.ray_address, run.nodes, run.cpus_per_node, run.gpus_per_node)
    if _kept.backend is None or _kept.terms != terms:
        _kept.drop()
        backend = _start_ray(config)
        if _kept.wanted:
            _kept.backend, _kept.terms = backend, terms
    else:
        backend = _kept.backend
    backend.retry, backend.resting = not config.private or config.privacy.noise == "seeded", False
    return backend


def check_reachable(address: str) -> None:
    """Raise ConfigError if no cluster is there. Ray waits for minutes for one; a connection attempt knows at once."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"run.ray_address = {address!r}: nothing answers there ({error}); give host:port of a running Ray head"
        ) from None


def _start_ray(config: RunConfig) -> ResilientRayBackend:
    run = config.run
    if run.ray_address:
        check_reachable(run.ray_address)
    join = {"address": run.ray_address} if run.ray_address else {"address": "local", "_node_ip_address": "127.0.0.1"}
    init = {**join, "logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
    if run.ray_address:
        del init["include_dashboard"]
    gpus = run.gpus_per_node
    resources = {"num_cpus": run.cpus_per_node, "num_gpus": gpus}
    try:
        backend = ResilientRayBackend(
            json.loads(json.dumps({"init_args": init, "client_resources": resources})),
            max_actors=run.nodes,
        )
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"run.ray_address = {run.ray_address!r}: no Ray cluster could be joined or started ({error})"
        ) from None
    interrupt.reinstall()  # Ray ends the process at SIGTERM
    total = ray.cluster_resources()
    if total.get("CPU", 0) < run.cpus_per_node or total.get("GPU", 0) < gpus:
        ray.shutdown()
        raise ConfigError(
            f"run.cpus_per_node = {run.cpus_per_node:g}, run.gpus_per_node = {gpus:g}: Ray has only "
            f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs; lower them"
        )
    return backend


def _register_run(state_factory: LinkStateFactory) -> FlowerRun:
    """Announce one run and its primary task to Flower's in-memory state, as its simulation runtime does."""
    run = FlowerRun.create_empty(run_id=generate_rand_int_from_bytes(RUN_ID_NUM_BYTES))
    run.primary_task_id = generate_rand_int_from_bytes(TASK_ID_NUM_BYTES)
    run.federation_id = NOOP_FEDERATION_ID
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
    state = state_factory.state()
    assert isinstance(state, InMemoryLinkState)
    state.run_ids[run.run_id] = RunRecord(run=run)
    state.task_store[run.primary_task_id] = Task(task_id=run.primary_task_id, run_id=run.run_id)
    return run
