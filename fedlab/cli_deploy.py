"""The commands of a deployment: ``fedlab keys``, ``fedlab server`` and ``fedlab run``. Thin over the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlab.command import DebugOption, QuietOption, SetOption, guarded
from fedlab.run.output import complain, say

keys = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keys of a server and of its clients.")

KeysArgument = Annotated[Path, typer.Argument(help="the coordinator's directory of keys", metavar="DIR")]
HostOption = Annotated[
    list[str] | None,
    typer.Option("--host", help="name or address by which clients reach the server; may be repeated", metavar="NAME"),
]
DaysOption = Annotated[int, typer.Option("--days", min=1, help="days until the server's certificate ends")]
DAYS = 365


def register(app: typer.Typer) -> None:
    """Add the commands to ``fedlab``."""
    app.add_typer(keys, name="keys")
    app.command()(server)
    app.command("run")(run_command)


def run_command(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, as of a simulation", metavar="RUN.toml")],
    server: Annotated[
        str,
        typer.Option(
            "--server",
            help="the coordinator's file, on the server's machine; or host:port of its inner port",
            metavar="SERVER.toml|HOST:PORT",
        ),
    ],
    keys: Annotated[
        Path | None, typer.Option("--keys", help="directory of keys; default: the server's file says it", metavar="DIR")
    ] = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="run directory (default: <name>-<time> in server.runs)", metavar="RUN_DIR"),
    ] = None,
    rehearsal: Annotated[
        bool,
        typer.Option(
            "--rehearsal", help="let seeded noise through, which protects nobody: to compare with a simulation"
        ),
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune one model with the clients of a server, each on its own machine."""

    def run() -> None:
        from fedlab.config import RunConfig
        from fedlab.run.launch import deploy_run
        from fedlab.run.launch.deploy.submit import deployment_of, place_of

        deployment = deployment_of(server, keys, rehearsal)
        found = RunConfig.load(config, set_ or [])
        deploy_run(found, deployment, out or place_of(deployment, found.run.name), quiet)

    guarded(run, debug, quiet)


def server(
    config: Annotated[Path, typer.Argument(help="the coordinator's file", metavar="SERVER.toml")],
    check: Annotated[bool, typer.Option("--check", help="look at the file and the keys, and start nothing")] = False,
    debug: DebugOption = False,
) -> None:
    """Serve clients until Ctrl-C or SIGTERM; then exit code 0."""

    def run() -> None:
        from fedlab.config.server import ServerFile
        from fedlab.run.launch.deploy import server as deployed

        file = ServerFile.load(config)
        if check:
            for warning in deployed.check(file):
                complain(f"fedlab: warning: {warning}")
            return
        deployed.serve(file)

    guarded(run, debug)


@keys.command("init")
def keys_init(
    directory: KeysArgument, host: HostOption = None, days: DaysOption = DAYS, debug: DebugOption = False
) -> None:
    """Make an authority, a server certificate and the executor's secret."""

    def run() -> None:
        from fedlab.run.launch.deploy.keys import init, show

        init(directory, host or [], days)
        _lines(show(directory))
        say(f"give every client {directory / 'ca.crt'}; keep the rest here, and {directory / 'ca.key'} safe")

    guarded(run, debug)


@keys.command("node")
def keys_node(
    name: Annotated[str, typer.Argument(help="the client's name", metavar="NAME")],
    out: Annotated[Path, typer.Option("--out", help="where NAME.key and NAME.pub go", metavar="DIR")] = Path(),
    debug: DebugOption = False,
) -> None:
    """Make a client's key pair, on the client's machine."""

    def run() -> None:
        from fedlab.run.launch.deploy.keys import make_node

        private, public = make_node(name, out)
        say(f"{private} stays on this machine; give {public} to the coordinator")

    guarded(run, debug)


@keys.command("add")
def keys_add(
    directory: KeysArgument,
    public: Annotated[Path, typer.Argument(help="a client's public key", metavar="NAME.pub")],
    debug: DebugOption = False,
) -> None:
    """Let a client in; a running server sees it within seconds."""

    def run() -> None:
        from fedlab.run.launch.deploy.keys import add_node

        node = add_node(directory, public)
        say(f"{node.name} is in: {node.fingerprint}")

    guarded(run, debug)


@keys.command("remove")
def keys_remove(
    directory: KeysArgument,
    name: Annotated[str, typer.Argument(help="the client's name", metavar="NAME")],
    debug: DebugOption = False,
) -> None:
    """Shut a client out; a running server refuses it within seconds."""

    def run() -> None:
        from fedlab.run.launch.deploy.keys import remove_node

        remove_node(directory, name)
        say(f"{name} is out")

    guarded(run, debug)


@keys.command("renew")
def keys_renew(
    directory: KeysArgument, host: HostOption = None, days: DaysOption = DAYS, debug: DebugOption = False
) -> None:
    """Make a new server certificate from the same authority; clients need nothing new."""

    def run() -> None:
        from fedlab.run.launch.deploy.keys import renew, show

        renew(directory, host or [], days)
        _lines(show(directory))
        say("a server that runs shows it within seconds")

    guarded(run, debug)


@keys.command("show")
def keys_show(directory: KeysArgument, debug: DebugOption = False) -> None:
    """What is there, until when it is valid, and who is let in.

    Exit code 2 if a server could not start with it.
    """

    def run() -> None:
        from fedlab.run.launch.deploy.keys import check_server, show

        _lines(show(directory))
        for warning in check_server(directory):
            complain(f"fedlab: warning: {warning}")

    guarded(run, debug)


def _lines(lines: list[str]) -> None:
    for line in lines:
        say(line)
