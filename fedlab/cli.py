"""The ``fedlab`` command: thin over the library.

Exit codes: 0 done, 2 wrong usage, 3 privacy, 4 run failed, 5 audit: less can be said than was asked, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedlab import cli_client, cli_deploy
from fedlab.command import DebugOption, QuietOption, SetOption
from fedlab.command import guarded as _guarded
from fedlab.run import output
from fedlab.run.output import say

app = typer.Typer(
    rich_markup_mode=None,  # square brackets are square brackets
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Private federated fine-tuning of language models.",
)

ConfigsArgument = Annotated[
    list[Path],
    typer.Argument(
        help="TOML file, for example simulations/quickstart.toml; several make a sweep", metavar="CONFIG.toml"
    ),
]
VaryOption = Annotated[
    list[str] | None,
    typer.Option("--vary", help="run once for each value: section.key=[value, ...]", metavar="KEY=[VALUES]"),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="run directory (default: runs/<name>-<time>)", metavar="RUN_DIR")
]


@app.command()
def simulate(
    configs: ConfigsArgument,
    set_: SetOption = None,
    vary: VaryOption = None,
    out: OutOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune one model with simulated clients; with several configurations or --vary one after the other, on one
    Ray.
    """

    def run() -> None:
        from fedlab.run.launch import load
        from fedlab.run.launch import simulate as start

        if len(configs) == 1 and not vary:
            start(load(configs[0], set_ or [], out), out, quiet)
            return
        from fedlab.run.launch.sweep import combinations, report, sweep

        found = sweep(combinations(configs, set_ or [], vary or []), out, quiet)
        raise SystemExit(report(found))

    _guarded(run, debug, quiet)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")], quiet: QuietOption = False, debug: DebugOption = False
) -> None:
    """Continue an interrupted or killed run from its last complete round."""

    def run() -> None:
        from fedlab.run.launch import resume as start

        start(run_dir, quiet)

    _guarded(run, debug, quiet)


@app.command()
def audit(
    target: Annotated[
        Path, typer.Argument(help="a run directory; with --empirical, a configuration", metavar="RUN_DIR|CONFIG.toml")
    ],
    empirical: Annotated[
        bool, typer.Option("--empirical", help="run the trainer of a configuration on canaries")
    ] = False,
    production: Annotated[
        bool, typer.Option("--production", help="with --empirical: the configured q, σ and steps, not q = 1")
    ] = False,
    canaries: Annotated[int, typer.Option("--canaries", min=2, help="with --empirical: how many")] = 2000,
    seed: Annotated[int, typer.Option("--seed", help="with --empirical: of coins and coordinates")] = 0,
    set_: SetOption = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="JSON file owner → public key, published elsewhere", metavar="FILE")
    ] = None,
    kept: Annotated[
        list[Path] | None,
        typer.Option("--kept", help="a client's own ledger, kept at home; may be repeated", metavar="FILE"),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    debug: DebugOption = False,
) -> None:
    """Recompute ε from the ledgers of a run and compare with what was claimed; or test the trainer itself.

    Exit code 0: verified, or consistent where neither --keys nor --kept was given; 5: less than that; 3: failed.
    """

    def run() -> None:
        from fedlab.run.audit import audit_directory, audit_trainer

        if empirical:
            raise SystemExit(3 if audit_trainer(target, set_ or [], canaries, seed, production, json_) else 0)
        raise SystemExit(audit_directory(target, keys, kept or [], json_))

    _guarded(run, debug)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")], debug: DebugOption = False) -> None:
    """Write report.html of a run again."""

    def run() -> None:
        from fedlab.report.html import write_report
        from fedlab.report.stream import write_stream_report
        from fedlab.run.directory import RunDirectory

        directory = RunDirectory.open(run_dir)
        say(str((write_stream_report if directory.config.is_stream else write_report)(directory.path)))

    _guarded(run, debug)


@app.command()
def merge(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    debug: DebugOption = False,
) -> None:
    """Add a run's adapter to its base, and write that as a plain transformers model."""

    def run() -> None:
        from fedlab.models.finished import merge as write

        say(str(write(run_dir, out)))

    _guarded(run, debug)


@app.command()
def generate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="what is asked; may be repeated", metavar="TEXT")],
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="longest answer, in tokens")] = 128,
    json_: Annotated[bool, typer.Option("--json", help="print a JSON object per answer")] = False,
    debug: DebugOption = False,
) -> None:
    """Ask a run's model; prompts are written as the run wrote them, answers are greedy."""

    def run() -> None:
        import json

        from fedlab.evaluate.generation import generate as answer
        from fedlab.models.finished import open_run, prompts_of

        model = open_run(run_dir)
        answers = answer(model, prompts_of(model, prompt), new_tokens, 8)
        for asked, said in zip(prompt, answers, strict=True):
            text = json.dumps({"prompt": asked, "answer": said}, ensure_ascii=False)
            say(text if json_ else said if len(prompt) == 1 else f"{asked}\n{said}\n")

    _guarded(run, debug)


@app.command()
def strategies(
    config: Annotated[
        Path | None,
        typer.Argument(help="also bytes per client and round for this configuration", metavar="[CONFIG.toml]"),
    ] = None,
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """All aggregation strategies: what clients send, what the mean is worth, what they go together with."""

    def run() -> None:
        from fedlab.run.launch import check, load, load_reference

        loaded = check(load(config, set_ or [])) if config else None
        columns = load_reference("strategies.table:columns")(loaded)
        rows = load_reference("strategies.table:rows")(loaded)
        _print_table(columns, [[cell.replace("`", "") for cell in row] for row in rows])

    _guarded(run, debug)


@app.command()
def explain(
    key: Annotated[
        str, typer.Argument(help="a key, such as train.lr, or a section; default: all", metavar="[KEY]")
    ] = "",
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of configuration files")] = False,
    debug: DebugOption = False,
) -> None:
    """What a key of the configuration means, what may stand there, and its default."""

    def run() -> None:
        import json

        from fedlab.config import RunConfig, load
        from fedlab.config import explain as explanation
        from fedlab.run.launch import STRATEGIES, load_reference

        if schema:
            say(json.dumps(load.schema(RunConfig), indent=2))
            return
        own = load_reference(STRATEGIES) if not key or key.startswith("strategy") else {}
        say(explanation.explain(RunConfig, key, {name: strategy.Options for name, strategy in own.items()}))

    _guarded(run, debug)


@app.command()
def doctor() -> None:
    """What is installed, what is missing, what this machine can run.

    Exit code 4 if the quickstart could not run here.
    """

    def run() -> None:
        from fedlab.run.doctor import examine

        raise SystemExit(0 if examine() else 4)

    _guarded(run, debug=False)


cli_deploy.register(app)
cli_client.register(app)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table where the terminal is wide enough for it; else a paragraph for each row, which begins with its name."""
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = output.console()
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    natural = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if natural <= console.width:
        console.print(table)
        return
    for name, *cells in rows:
        console.print(Text(name, "bold"))
        width = max(map(len, columns[1:])) + 2
        for column, cell in zip(columns[1:], cells, strict=True):
            lines = Text(cell).wrap(console, max(20, console.width - width - 2))
            for number, line in enumerate(lines):
                console.print(Text(f"  {'' if number else column:<{width}}") + line, soft_wrap=True)


def main() -> None:
    """The command, whatever becomes of its output."""
    output.settle()
    app()


if __name__ == "__main__":
    main()
