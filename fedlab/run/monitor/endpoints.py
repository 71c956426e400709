"""The endpoints of a server and of a client: what they show of the snapshots, and of what their supervisors know.

``prometheus_client`` is imported where an address is given, so that a process without one needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlab.run.monitor.snapshot import read

if TYPE_CHECKING:
    from fedlab.run.monitor.exporter import Exporter

RUN_FILE, CLIENT_FILE = "run.monitor.json", "trainer.monitor.json"  # in server.state, and beside the trainer's socket
STATUSES = ("none", "starting", "running", "completed", "budget-exhausted", "interrupted", "failed", "killed")
ENDED = {"completed", "budget-exhausted", "interrupted", "failed"}
Values = Callable[[], Mapping[str, Any]]


@contextmanager
def server_endpoint(
    address: str | None, run: Path, values: Values, ready: Callable[[], str | None], exposed: bool = False
) -> Iterator[Exporter | None]:
    """The endpoint of a server while the block runs; none, and nothing happens, without an address.

    Args:
        address: ``metrics.address``.
        run: snapshot of the run that is on (``RUN_FILE`` in the state directory), which need not be there.
        values: key → value of ``metrics.SERVER`` but ``ready``; called from another thread at each scrape.
        ready: why no run can be started now, in fixed words; None if one can.
        exposed: ``metrics.exposed``.

    Raises:
        ConfigError: see ``Exporter``.
    """
    if address is None:
        yield None
        return
    from fedlab.run.monitor.exporter import Exporter
    from fedlab.run.monitor.metrics import RUN, SERVER, Figures

    figures = [
        Figures(SERVER, lambda: {**values(), "ready": ready() is None}),
        Figures(RUN, lambda: run_values(run)),
    ]
    with Exporter(address, figures, ready, exposed) as exporter:
        yield exporter


@contextmanager
def client_endpoint(
    address: str | None, trainer: Path, values: Values = dict, exposed: bool = False
) -> Iterator[Exporter | None]:
    """The endpoint of a client while the block runs; none, and nothing happens, without an address.

    Args:
        address: ``metrics.address``.
        trainer: its snapshot (``CLIENT_FILE``), which need not be there yet.
        values: ``restarts``, process → how often it was started again, where a supervisor counts them.
        exposed: ``metrics.exposed``.

    Raises:
        ConfigError: see ``Exporter``.
    """
    if address is None:
        yield None
        return
    from fedlab.run.monitor.exporter import Exporter
    from fedlab.run.monitor.metrics import CLIENT, Figures

    figures = [Figures(CLIENT, lambda: {**values(), **client_values(trainer)})]
    with Exporter(address, figures, lambda: client_problem(trainer), exposed) as exporter:
        yield exporter


def run_values(path: Path) -> dict[str, Any]:
    """Key → value of ``metrics.RUN``, of the run that writes this snapshot, or did last."""
    found = read(path)
    values = dict(found.values) if found is not None else {}
    status = values.get("status", "none")
    if found is not None and not found.alive and status not in ENDED:
        status = "killed"
    return {**values, "status": {name: int(name == status) for name in STATUSES}}


def client_values(path: Path) -> dict[str, Any]:
    """Key → value of ``metrics.CLIENT``, from a trainer's snapshot."""
    found = read(path)
    if found is None:
        return {"up": False, "ready": False}
    return {**found.values, "up": found.alive, "ready": found.alive and bool(found.values.get("ready"))}


def client_problem(path: Path) -> str | None:
    """Why a client would answer no request now; None if it would."""
    values = client_values(path)
    if not values["up"]:
        return "the trainer is not running"
    return None if values["ready"] else "the trainer has not opened its model and data yet"
