"""Start a run: the server's and the clients' apps, by reference, on Ray or in this process.

The only part of ``fedlab`` that knows Flower and Ray. Everything private of Flower's that is used sits in this package;
flwr is pinned to the version it was written for.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, FedlabError, Interrupted, RunFailed, Unwritable
from fedlab.files import unwritable
from fedlab.run.deployment import Deployment
from fedlab.run.directory import RunDirectory
from fedlab.run.launch.checks import check, check_strategy, load, look, look_at_deployed, with_labels
from fedlab.run.launch.environment import QUIET_ENVIRONMENT
from fedlab.run.launch.problems import Problems
from fedlab.run.launch.reference import CLIENT_APP, SERVER_APP, STRATEGIES, load_reference

__all__ = [
    "CLIENT_APP",
    "SERVER_APP",
    "STRATEGIES",
    "Run",
    "check",
    "check_strategy",
    "deploy_run",
    "load",
    "load_reference",
    "prepared",
    "resume",
    "simulate",
    "simulate_or_resume",
]


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
    return _launch(RunDirectory.create(prepared(config, out), Path(out) if out is not None else None), quiet)


def deploy_run(
    config: RunConfig, deployment: Deployment, out: str | Path | None = None, quiet: bool = False, backend: Any = None
) -> Run:
    """Run a configuration with clients on machines of their own, and return it.

    Args:
        config: the run; it must name its labels, where its objective has any, and the number of clients.
        deployment: which server, and what the server knows.
        out: as of ``simulate``.
        quiet: print errors only.
        backend: what carries messages; default: a server started by ``fedlab server``.

    Raises:
        ConfigError: the configuration cannot be deployed.
        RunFailed, Interrupted: as ``simulate``.
    """
    directory = RunDirectory.create(prepared_to_deploy(config, out), Path(out) if out is not None else None)
    deployment.write(directory.path)
    return _launch(directory, quiet, backend)


def prepared_to_deploy(config: RunConfig, out: str | Path | None = None) -> RunConfig:
    """The configuration as it will be deployed: type and hash of the base written down, and that sums are masked. No
    data are looked at.

    Raises one error for everything that can be known to be wrong.
    """
    from fedlab.models.fingerprint import model_fingerprint
    from fedlab.models.hardware import resolve_dtype

    _prepare_environment(config)
    found = Problems()
    if out is not None:
        found.of(lambda: RunDirectory.check_place(Path(out)))
    look_at_deployed(found, config)
    found.raise_all()
    resolved: RunConfig = load_reference(STRATEGIES)[config.strategy.name].resolved(config)
    model = resolved.model.model_copy(update={"sha256": resolved.model.sha256 or model_fingerprint(resolved.model)})
    # clients on machines of their own mask their parts of a sum, whatever is asked: what the run says of itself is so
    privacy = resolved.privacy.model_copy(update={"masked": resolved.shared_noise})
    return resolve_dtype(resolved.model_copy(update={"model": model, "privacy": privacy}))


def prepared(config: RunConfig, out: str | Path | None = None) -> RunConfig:
    """The configuration as it will run: number of clients, names of the labels and type of the base written down.

    Raises one error for everything that can be known to be wrong before a process is started, with the configuration
    and with the directory ``out`` where it is to run.
    """
    from fedlab.models.hardware import resolve_dtype
    from fedlab.run.data import refresh

    _prepare_environment(config)
    refresh(config)
    found = Problems()
    if out is not None:
        found.of(lambda: RunDirectory.check_place(Path(out)))
    config = look(found, config, texts=True)
    found.raise_all()
    resolved: RunConfig = load_reference(STRATEGIES)[config.strategy.name].resolved(config)
    return resolve_dtype(with_labels(resolved))


def resume(path: str | Path, quiet: bool = False, backend: Any = None) -> Run:
    """Continue a run that was interrupted or killed, from its last complete round.

    The bits are those of an unbroken run; a deployed one goes on with the clients that come back. ``backend``: as of
    ``deploy_run``.
    """
    from fedlab.run.data import check_unchanged, refresh

    directory = RunDirectory.open(Path(path))
    _prepare_environment(directory.config)
    if Deployment.of(directory.path) is not None:
        if directory.finished:
            raise ConfigError(f"{str(path)!r} is {directory.finished['status']}; there is nothing to resume")
        return _launch(directory, quiet, backend)
    refresh(directory.config)
    if directory.config.is_stream:
        from fedlab.run.launch.stream import resume_stream

        return resume_stream(path, quiet)
    if directory.finished:
        raise ConfigError(f"{str(path)!r} is {directory.finished['status']}; there is nothing to resume")
    check(directory.config)
    check_unchanged(directory.path, directory.config)
    return _launch(directory, quiet)


def simulate_or_resume(path: Path, config: RunConfig, quiet: bool) -> Run:
    """The run in this directory: what it came to if it is finished; else it is started, or resumed."""
    if not (path / "run.toml").is_file() or RunDirectory(path).never_began:
        return simulate(config, path, quiet)
    result = RunDirectory.open(path).finished
    return Run(path.absolute(), result) if result is not None else resume(path, quiet)


def _prepare_environment(config: RunConfig) -> None:
    """Set what is not set yet.

    In a cluster that is joined, the other machines' workers must be able to reach this process.
    """
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if config.run.ray_address is None else "1"}
    for key, value in {**QUIET_ENVIRONMENT, **loopback}.items():
        os.environ.setdefault(key, value)


def _launch(directory: RunDirectory, quiet: bool, backend: Any = None) -> Run:
    config = directory.config
    backend = backend or _backend(directory)
    again = f"fedlab resume {shlex.quote(str(directory.path))}"
    try:
        backend(
            load_reference(SERVER_APP),
            load_reference(CLIENT_APP),
            config,
            {"run-dir": str(directory.path), "quiet": quiet},
        )
    except (KeyboardInterrupt, SystemExit):  # before the server's app, which turns them into Interrupted
        _ensure_result(directory, "by a signal", "interrupted")
        raise Interrupted(f"interrupted; continue with: {again}") from None
    except Exception as error:
        told = str(error) if isinstance(error, FedlabError) else f"{type(error).__name__}: {error}"
        _ensure_result(directory, told)
        if (full := unwritable(error, directory.path)) is not None:
            if directory.finished:  # all but its report
                again = again.replace("resume", "report", 1)
            raise Unwritable.told(f"{full}, then continue with: {again}") from error
        if isinstance(error, FedlabError):
            raise
        raise RunFailed(f"the run failed: {type(error).__name__}: {error}\nsee {directory.path / 'log.txt'}") from error
    result = directory.result
    if result is None:
        raise RunFailed(f"the server app ended without a result; see {directory.path / 'log.txt'}")
    return Run(directory.path, result)


def _backend(directory: RunDirectory) -> Any:
    """What carries the messages of the run in this directory."""
    if Deployment.of(directory.path) is not None:
        from fedlab.run.launch.deploy.submit import run_deployed

        return run_deployed
    if directory.config.run.backend == "local":
        from fedlab.run.launch.local import run_local

        return run_local
    from fedlab.run.launch.ray import run_ray

    return run_ray


def _ensure_result(directory: RunDirectory, reason: str, status: str = "failed") -> None:
    """Say in ``result.json`` how a run ended that the server's app could not say it of."""
    if directory.result is not None:
        return
    try:
        directory.write_json("result.json", {"status": status, "reason": reason})
    except Unwritable:
        return  # without a result it is a run that was killed, and resumes like one
