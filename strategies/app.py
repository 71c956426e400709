"""The ServerApp: opens the run directory, runs the rounds, and leaves a result whatever happens.

``fedlab simulate`` passes the run directory; under ``flwr run .`` the run configuration names a preset and a directory
is made.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, FedlabError, Interrupted
from fedlab.privacy.statement import write_statement
from fedlab.run import interrupt
from fedlab.run.directory import RunDirectory, json_text, jsonable
from fedlab.run.launch import prepared
from fedlab.run.metrics import MetricsLog
from fedlab.run.monitor.rounds import watched
from fedlab.run.progress import make_progress
from fedlab.run.seal import ADAPTER, UNSEALED_ADAPTER, measure
from strategies.server.epilogue import epilogue
from strategies.server.loop import Rounds
from strategies.server.memorised import announced, memorised
from strategies.server.server_data import server_data
from strategies.server.task_boundary import end_stage

app = ServerApp()
logger = logging.getLogger("fedlab")
INTERRUPTS = (KeyboardInterrupt, SystemExit)  # the latter by a library's own handler of signals


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run to the end, to the budget, or to an exception; ``result.json`` says which."""
    directory = _directory(context)
    config = directory.config
    if config.is_stream:
        raise ConfigError(
            "a configuration with [[tasks]] is a chain of runs: start it with fedlab simulate, or give one task as"
            " [stage]"
        )
    progress = make_progress(config, directory.path, quiet=bool(context.run_config.get("quiet", False)))
    events = MetricsLog(directory, config.run.tensorboard)
    progress = watched(progress, events, directory, context.run_config, grid.get_node_ids)
    started = time.time()
    rounds: Rounds | None = None
    try:
        with progress:
            progress.note("preparing model and data")
            lines = announced(config)
            data = server_data(config, directory)
            data.record(directory, lines.append)
            for line in lines:
                logger.info("%s", line)
                progress.remark(line)
            rounds = Rounds(grid, config, directory, events, progress, data)
            status = rounds.run()
            end_stage(rounds, status)
            result = _finish(directory, rounds, events, status, started)
            progress.finished(result)
    except BaseException as error:
        _leave(directory, rounds, error, started)
        if isinstance(error, INTERRUPTS):
            raise Interrupted(f"interrupted; continue with: fedlab resume {shlex.quote(str(directory.path))}") from None
        raise
    finally:
        events.close()


def _directory(context: Context) -> RunDirectory:
    if run_dir := context.run_config.get("run-dir"):
        return RunDirectory.open(Path(str(run_dir)))
    preset = Path(str(context.run_config["config"]))
    if not preset.is_absolute():
        preset = Path(__file__).resolve().parents[1] / preset
    return RunDirectory.create(prepared(RunConfig.load(preset)), None)


def _finish(directory: RunDirectory, rounds: Rounds, events: MetricsLog, status: str, started: float) -> dict[str, Any]:
    """Save, claim, seal, and only then show: whatever is cut off in between, nothing lies there without its seal."""
    from fedlab.report.html import render_report

    path = directory.path
    rounds.save_personal_adapters()
    _save_adapter(rounds, path)
    rounds.close()
    known = rounds.result()
    known |= memorised(rounds, known)
    write_statement(path, known["clients"], known.get("memorisation"))
    result = {"status": status, **known, "seconds": round(time.time() - started, 2)}
    result |= epilogue(directory, rounds, result)
    events.close()  # what happens from here on is not in metrics.jsonl
    later = {"report.html": render_report(path, jsonable(result)), "result.json": json_text(result)}
    rounds.seal(measure(path, later), status)
    if (path / UNSEALED_ADAPTER).is_dir():
        (path / UNSEALED_ADAPTER).rename(path / ADAPTER)
    for name, text in later.items():
        directory.write_text(name, text)
    rounds.accounts.destroy_keys()
    return result


def _save_adapter(rounds: Rounds, path: Path) -> None:
    """Under another name until it is sealed; whole, if it is there: the run was cut off after it."""
    from fedlab.models.plain import REJECTED, save_checked

    if (path / ADAPTER).is_dir():
        return
    shutil.rmtree(path / UNSEALED_ADAPTER, ignore_errors=True)
    rejected = path / (ADAPTER + REJECTED)
    save_checked(rounds.session.model, rounds.state, path / UNSEALED_ADAPTER, rounds.config, rejected)


def _leave(directory: RunDirectory, rounds: Rounds | None, error: BaseException, started: float) -> None:
    """Record why the run ended early. Never raises: the first error is the one to show; nor is it interrupted again."""
    with interrupt.deferred():
        _record(directory, rounds, error, started)


def _record(directory: RunDirectory, rounds: Rounds | None, error: BaseException, started: float) -> None:
    from fedlab.report.html import write_report

    if rounds is not None and directory.finished:  # all is there and sealed
        rounds.accounts.destroy_keys()
        return
    status = "interrupted" if isinstance(error, INTERRUPTS) else "failed"
    reason = str(error) if isinstance(error, FedlabError) else f"{type(error).__name__}: {error}"
    if status == "interrupted":
        reason = "by a signal"
    logger.error(
        "run %s: %s", status, reason, exc_info=None if isinstance(error, (FedlabError, *INTERRUPTS)) else error
    )
    try:
        known = rounds.result() if rounds is not None else _known_before(directory)
        if rounds is not None:  # what was spent is spent, however the run ended
            write_statement(directory.path, known["clients"])
    except Exception as second:  # the result itself may be what broke
        known = {"result_error": str(second)}
    result = {"status": status, "reason": reason, **known, "seconds": round(time.time() - started, 2)}
    try:
        if rounds is not None and "result_error" not in known:
            result |= epilogue(directory, rounds, result)
    except Exception as second:
        logger.error("no warnings: %s", second)
    try:
        directory.write_json("result.json", result)
        write_report(directory.path)
    except Exception as second:  # a full disk; without a new result the run is one that was killed
        logger.error("the end of the run could not be written down: %s", second)


def _known_before(directory: RunDirectory) -> dict[str, Any]:
    """What an earlier end of the run knew: a resumption that fails at once takes nothing of it back."""
    own = ("status", "reason", "seconds", "result_error")
    return {name: value for name, value in (directory.result or {}).items() if name not in own}
