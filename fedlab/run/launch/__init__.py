"""Start a run: the server's and the clients' apps, by reference, on Ray or in this process.

The only part of ``fedlab`` that knows Flower and Ray. Everything private of Flower's that is used sits in this package;
flwr is pinned to the version it was written for.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from fedlab.config import RunConfig
from fedlab.config.load import unknown_key
from fedlab.errors import ConfigError, FedlabError, RunFailed
from fedlab.run.directory import RunDirectory

SERVER_APP, CLIENT_APP, STRATEGIES = "strategies.app:app", "clients.app:app", "strategies:STRATEGIES"

# Set before flwr or ray is imported: no telemetry, no update check, no installing at run time.
QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a late call after shutdown must not start a second Ray
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Run:
    """A finished run: where it lies, and its ``result.json``."""

    path: Path
    result: dict[str, Any]


def simulate(config: RunConfig, out: str | Path | None = None, quiet: bool = False) -> Run:
    """Run a simulation to its end and return it.

    ``out`` is the run directory (default ``runs/<name>-<time>``); it must not hold anything yet. Raises ConfigError
    before anything is started if the configuration, the model or the data cannot work, RunFailed if the run could not
    be finished (``result.json`` then says why), Interrupted on Ctrl-C. A configuration with ``[[tasks]]`` is a stream
    of runs, one per task (``launch.stream``).
    """
    if config.is_stream:
        from fedlab.run.launch.stream import simulate_stream

        return simulate_stream(config, out, quiet)
    return _launch(RunDirectory.create(prepared(config), Path(out) if out is not None else None), quiet)


def prepared(config: RunConfig) -> RunConfig:
    """The configuration as it will run: number of clients, names of the labels and type of the base written down.

    Raises ConfigError for everything that can be known to be wrong before a process is started.
    """
    from fedlab.models.hardware import resolve_dtype

    _prepare_environment(config)
    config = check(config)
    resolved: RunConfig = load_reference(STRATEGIES)[config.strategy.name].resolved(config)
    return resolve_dtype(_with_labels(resolved))


def _with_labels(config: RunConfig) -> RunConfig:
    """The same run with the names of its labels, for clients to agree on; they are those of the data."""
    from fedlab.data import corpus_and_shards

    names = corpus_and_shards(config)[0].label_names
    objective = config.objective.model_copy(update={"labels": names})
    return config.model_copy(update={"objective": objective})


def resume(path: str | Path, quiet: bool = False) -> Run:
    """Continue a run that was interrupted or killed, from its last complete round.

    The bits are those of an unbroken run.
    """
    directory = RunDirectory.open(Path(path))
    _prepare_environment(directory.config)
    if directory.config.is_stream:
        from fedlab.run.launch.stream import resume_stream

        return resume_stream(path, quiet)
    if directory.finished:
        raise ConfigError(f"{str(path)!r} is {directory.finished['status']}; there is nothing to resume")
    check(directory.config)
    return _launch(directory, quiet)


def simulate_or_resume(path: Path, config: RunConfig, quiet: bool) -> Run:
    """The run in this directory: what it came to if it is finished; else it is started, or resumed."""
    if not (path / "run.toml").is_file():
        return simulate(config, path, quiet)
    result = RunDirectory.open(path).finished
    return Run(path.absolute(), result) if result is not None else resume(path, quiet)


def check(config: RunConfig) -> RunConfig:
    """The configuration with its number of clients, after everything was looked at that can be known to be wrong before
    a process is started: names and files first, then keys, then the data. Raises ConfigError.
    """
    from fedlab.data.public import check_public
    from fedlab.evaluate import evaluators_of
    from fedlab.models.hub import check_model
    from fedlab.privacy.client_level import make_client_plan

    _check_sources(config)
    check_public(config)
    check_model(config.model)
    if not config.population_known:
        config = config.with_population(len(_clients(config)))
    if config.privacy.unit == "client":
        make_client_plan(config)
    check_strategy(config)
    evaluators_of(config)
    _check_clients(config)
    return config


def _check_sources(config: RunConfig) -> None:
    from fedlab.data.opening import section_of
    from fedlab.data.sources import check_source

    for data in [section_of(config.data, task) for task in config.tasks] or [config.data]:
        check_source(data)


def _check_clients(config: RunConfig) -> None:
    """Names and sizes of the clients, which only the partition knows."""
    from fedlab.config.clients import check_names
    from fedlab.privacy.plan import delta_of

    clients = _clients(config)
    check_names(config, list(clients))
    if config.privacy.unit == "example":
        for examples in clients.values():
            delta_of(config.privacy, examples)


def _clients(config: RunConfig) -> dict[str, int]:
    """Client id → its training examples."""
    from fedlab.data import corpus_and_shards

    return {client: len(positions) for client, positions in corpus_and_shards(config)[1].train.items()}


def check_strategy(config: RunConfig) -> None:
    """The strategy exists and its own keys are its own. Raises ConfigError that names the nearest ones."""
    known = load_reference(STRATEGIES)
    name = config.strategy.name
    if name not in known:
        raise ConfigError(
            unknown_key(f"strategy.name = {name}", name, sorted(known))
            .replace("unknown key", "unknown")
            .replace("did you mean strategy.name = ", "did you mean ")
        )
    try:
        known[name].Options(**config.strategy.options)
    except pydantic.ValidationError as error:
        detail = error.errors()[0]
        key = str(detail["loc"][-1])
        if detail["type"] == "extra_forbidden":
            fields = ["name", "weights", *known[name].Options.model_fields]
            raise ConfigError(f'{unknown_key(f"strategy.{key}", key, fields)} (strategy "{name}")') from None
        raise ConfigError(
            f"strategy.{key}: {detail['msg'].replace('Input should', 'must')}, got {detail['input']!r}"
        ) from None
    known[name].check(config)


def _prepare_environment(config: RunConfig) -> None:
    """Set what is not set yet.

    In a cluster that is joined, the other machines' workers must be able to reach this process.
    """
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if config.run.ray_address is None else "1"}
    for key, value in {**QUIET_ENVIRONMENT, **loopback}.items():
        os.environ.setdefault(key, value)


def load_reference(reference: str) -> Any:
    """``"module:attribute"`` → the object, as Flower itself names apps."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _launch(directory: RunDirectory, quiet: bool) -> Run:
    from fedlab.run.launch.local import run_local
    from fedlab.run.launch.ray import run_ray

    config = directory.config
    backend = {"ray": run_ray, "local": run_local}[config.run.backend]
    try:
        backend(
            load_reference(SERVER_APP),
            load_reference(CLIENT_APP),
            config,
            {"run-dir": str(directory.path), "quiet": quiet},
        )
    except (FedlabError, KeyboardInterrupt):
        _ensure_result(directory)
        raise
    except Exception as error:
        _ensure_result(directory, f"{type(error).__name__}: {error}")
        raise RunFailed(f"the run failed: {type(error).__name__}: {error}\nsee {directory.path / 'log.txt'}") from error
    result = directory.result
    if result is None:
        raise RunFailed(f"the server app ended without a result; see {directory.path / 'log.txt'}")
    return Run(directory.path, result)


def _ensure_result(directory: RunDirectory, reason: str = "ended before the first round") -> None:
    if directory.result is None:
        directory.write_json("result.json", {"status": "failed", "reason": reason})
