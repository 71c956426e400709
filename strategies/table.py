"""One table of all strategies, from what the classes declare: printed by ``fedlab strategies``, kept in docs/strategies.md by a test."""

from __future__ import annotations

from fedlab.config import RunConfig
from fedlab.lora.state import nbytes, select
from strategies import STRATEGIES
from strategies.base import LoraStrategy

COLUMNS = (
    "strategy.name",
    "clients train and send",
    "effective weights after a round",
    "client-level DP",
    "secure aggregation",
    "own keys",
)
SIZES = ("bytes up", "bytes down")


def rows(config: RunConfig | None = None) -> list[tuple[str, ...]]:
    """A row per strategy, in the order of ``STRATEGIES``; with a configuration also its bytes per client and round."""
    return [_row(name, strategy) + (_bytes(strategy, config) if config else ()) for name, strategy in STRATEGIES.items()]


def columns(config: RunConfig | None = None) -> tuple[str, ...]:
    """The names of the columns."""
    return COLUMNS + (SIZES if config else ())


def markdown() -> str:
    """The table as it stands in docs/strategies.md."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows())]
    return "\n".join(lines).replace("| --- |", "|---|").replace(" --- |", "---|") + "\n"


def _row(name: str, strategy: type[LoraStrategy]) -> tuple[str, ...]:
    trained = ", ".join([*(part.removeprefix("lora_") for part in sorted(strategy.trains)), "head"])
    keys = ", ".join(f"`{key}`" for key in strategy.Options.model_fields) or "–"
    yes = "yes" if strategy.linear else "no"
    return (f"`{name}`", trained, strategy.effective, yes, yes, keys)


def _bytes(strategy: type[LoraStrategy], config: RunConfig) -> tuple[str, str]:
    """Per participating client in the first round, in the wire dtype; a residual adds to what goes down in later rounds."""
    from fedlab.session import open_session

    state = open_session(config.to_toml()).model.state()
    wire = config.run.wire_dtype
    trained = set(strategy.trains) | ({"head"} if config.train.head == "train" else set())
    return f"{nbytes(select(state, trained), wire):,}", f"{nbytes(state, wire):,}{' + residual' if strategy.folds else ''}"
