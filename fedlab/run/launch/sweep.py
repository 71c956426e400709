"""Several runs one after the other: every combination of configurations and varied values, on one Ray, each in its own
directory.
"""

from __future__ import annotations

import itertools
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, FedlabError, Interrupted
from fedlab.run.directory import RunDirectory
from fedlab.run.launch import Run, prepared, simulate_or_resume
from fedlab.run.launch.problems import Problems
from fedlab.run.output import console, say


def combinations(
    configs: Sequence[Path], overrides: Sequence[str] = (), vary: Sequence[str] = ()
) -> dict[str, RunConfig]:
    """Name → configuration of every combination. ``vary`` holds ``section.key=[value, ...]``; a name says what differs.

    Raises ConfigError for what is no list, an empty one, or two combinations that are the same.
    """
    axes = [_axis(text) for text in vary]
    found: dict[str, RunConfig] = {}
    for config in configs:
        for values in itertools.product(*(texts for _, texts in axes)):
            settings = [f"{key}={value}" for (key, _), value in zip(axes, values, strict=True)]
            parts = [config.stem] * (len(configs) > 1) + settings
            name = re.sub(r"[^\w.=+-]", "_", ",".join(part.replace('"', "") for part in parts).replace(",", "+"))
            if name in found:
                raise ConfigError(
                    f"two runs of the sweep would be called {name!r}; give each configuration file and each value once"
                )
            found[name] = RunConfig.load(config, [*overrides, *settings])
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    """Key, and its values as TOML."""
    import tomli_w

    key, equals, raw = text.partition("=")
    try:
        values = tomllib.loads(f"v = {raw}")["v"] if equals else None
    except tomllib.TOMLDecodeError:
        values = None
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"--vary {text!r}: write section.key=[value, value], for example --vary 'train.lr=[0.5, 1.5]'"
        )
    return key.strip(), [
        tomli_w.dumps({"v": [value]}).partition("=")[2].strip()[1:-1].strip().removesuffix(",") for value in values
    ]


def sweep(
    configs: Mapping[str, RunConfig], out: str | Path | None = None, quiet: bool = False
) -> dict[str, Run | FedlabError]:
    """Run every configuration; name → its run, or why it failed (which does not stop the others).

    Each lies in ``out/<name>`` (default ``runs/sweep-<time>``) and has the bits that it has alone. All configurations
    are checked before the first run starts (ConfigError). What is finished in ``out`` already is not run again, and
    what was cut off is resumed; Ctrl-C raises Interrupted, after which the same call goes on.
    """
    from fedlab.run.launch.ray import keep_ray

    folder = Path(out) if out is not None else Path("runs") / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    ready = _ready(configs, folder)
    found: dict[str, Run | FedlabError] = {}
    with keep_ray():
        for number, (name, config) in enumerate(ready.items(), 1):
            if not quiet:
                say(f"\n[{number}/{len(ready)}] {name}")
            try:
                found[name] = simulate_or_resume(folder / name, config, quiet)
            except Interrupted:
                raise Interrupted(f"interrupted in {name}; the same command with --out {folder} goes on") from None
            except FedlabError as error:
                found[name] = error
    return found


def _ready(configs: Mapping[str, RunConfig], folder: Path) -> dict[str, RunConfig]:
    """Every configuration as it will run. Raises one error for all that is wrong with any of them."""
    ready: dict[str, RunConfig] = {}
    wrong: dict[str, list[str]] = {}
    for name, config in configs.items():
        found = Problems()
        resolved = found.of(lambda config=config: prepared(config))  # type: ignore[misc]
        place = RunDirectory(folder / name)
        if resolved is not None:
            ready[name] = resolved
            begun = (place.path / "run.toml").is_file() and not place.never_began
            if begun and RunDirectory.open(place.path).config != resolved:
                found.add(
                    ConfigError(f"{str(place.path)!r} holds a run of another configuration; choose another --out")
                )
        for problem in found.found:
            wrong.setdefault(str(problem), []).append(name)
    told = Problems()
    for text, names in wrong.items():
        told.add(ConfigError(text if len(names) == len(configs) else f"{', '.join(names)}: {text}"))
    told.raise_all()
    return ready


def report(found: Mapping[str, Run | FedlabError]) -> int:
    """Print a line per run; returns the exit code, that of the gravest failure."""
    from fedlab.privacy.promise import shown_epsilon  # here: torch comes with it

    table = Table(box=None, pad_edge=False)
    for column in ("run", "status", "score", "clients' mean", "ε", "seconds"):
        table.add_column(column, overflow="fold")
    for name, run in found.items():
        if isinstance(run, FedlabError):
            table.add_row(name, f"failed: {str(run).splitlines()[0]}", "", "", "", "")
            continue
        result = run.result
        primary, mean = result["primary"], result["client_scores"]["mean"]
        own = (result["scores"] or {}).get(primary)
        numbers = ["–" if value is None else f"{primary} {value:.4f}" for value in (own, mean)]
        table.add_row(name, result["status"], *numbers, shown_epsilon(result["epsilon"]), f"{result['seconds']:.1f}")
    console().print(table)
    for name, run in found.items():
        for text in run.result.get("warnings", ()) if isinstance(run, Run) else ():
            say(f"warning: {name}: {text}")
    return max((run.exit_code for run in found.values() if isinstance(run, FedlabError)), default=0)
