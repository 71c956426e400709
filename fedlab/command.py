"""What all commands share: a few options, and how they end, with errors as sentences and exit codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from fedlab.errors import FedlabError, Interrupted
from fedlab.files import unwritable
from fedlab.run import interrupt, output
from fedlab.run.output import complain

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one key: section.key=value (the value is TOML)", metavar="KEY=VALUE"),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="print errors only")]
DebugOption = Annotated[bool, typer.Option("--debug", help="show a traceback with an error")]


def guarded(action: Callable[[], None], debug: bool, quiet: bool = False) -> None:
    """Run a command; end with the error's message and its exit code."""
    interrupt.install()
    output.settle(quiet)
    try:
        action()
    except FedlabError as error:
        _fail(error, debug, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        _fail(error, debug, "interrupted", Interrupted.exit_code)
    except Exception as error:
        told: object = unwritable(error)
        if told is None and isinstance(error, OSError):
            told = f"{error.filename}: {error.strerror}"
        if told is not None:  # the machine's fault, not fedlab's
            _fail(error, debug, str(told), 4)
        _fail(error, debug, f"{type(error).__name__}: {error} (this is a bug in fedlab; --debug shows where)", 4)


def _fail(error: BaseException, debug: bool, message: str, code: int) -> NoReturn:
    if debug:
        import traceback

        complain("".join(traceback.format_exception(error)).rstrip())
    complain(f"fedlab: {message}" if code == Interrupted.exit_code else f"fedlab: error: {message}")
    raise SystemExit(code)
