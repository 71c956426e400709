"""One table of all strategies, from what the classes declare: printed by ``fedlab strategies``, kept in
docs/strategies.md by a test.
"""

from __future__ import annotations

from collections.abc import Collection

from fedlab.config import RunConfig
from fedlab.config.sections import StrategySection
from fedlab.errors import ConfigError
from fedlab.lora.state import nbytes
from strategies import STRATEGIES
from strategies.base import Strategy

COLUMNS = (
    "strategy.name",
    "clients train",
    "and keep",
    "effective weights after a round",
    "clients of lower rank",
    "client-level DP",
    "shared noise",
    "own keys",
)
SIZES = ("bytes up", "bytes down")


def rows(config: RunConfig | None = None) -> list[tuple[str, ...]]:
    """A row per strategy, in the order of ``STRATEGIES``; with a configuration also its bytes per client and round."""
    return [
        _row(name, strategy) + (_bytes(name, strategy, config) if config else ())
        for name, strategy in STRATEGIES.items()
    ]


def columns(config: RunConfig | None = None) -> tuple[str, ...]:
    """The names of the columns."""
    return COLUMNS + (SIZES if config else ())


def markdown() -> str:
    """The table as it stands in docs/strategies.md."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ("---",) * len(COLUMNS), *rows())]
    return "\n".join(lines).replace("| --- |", "|---|").replace(" --- |", "---|") + "\n"


def _row(name: str, strategy: type[Strategy]) -> tuple[str, ...]:
    keys = ", ".join(f"`{key}`" for key in strategy.Options.model_fields) or "–"
    linear = "yes" if strategy.linear else "no"
    noised = "no" if strategy.personal or strategy.reads_inputs else linear
    shared = "no" if strategy.unsummed() else "yes"
    trained, kept = parts({*strategy.trains, "head"}), parts(strategy.personal) or "–"
    return (f"`{name}`", trained, kept, strategy.effective, strategy.ranks or "refused", noised, shared, keys)


def parts(names: Collection[str]) -> str:
    """``lora_A``, ``lora_B``, ``head`` as "A, B, head"."""
    return ", ".join(part.removeprefix("lora_") for part in ("lora_A", "lora_B", "head") if part in names)


def _bytes(name: str, strategy: type[Strategy], config: RunConfig) -> tuple[str, str]:
    """Per participating client, in the wire dtype: up in the first two rounds if they differ; a residual adds to what
    goes down later.

    For another strategy than the configured one, with its own keys at their defaults. What the strategy refuses says
    why.
    """
    from fedlab.session import open_session

    if name != config.strategy.name:
        config = config.model_copy(update={"strategy": StrategySection(name=name, weights=config.strategy.weights)})
    try:
        made = strategy(config)
    except ConfigError as error:
        return "refused", str(error)
    state, wire = open_session(config.to_toml()).model.state(), config.run.wire_dtype
    up = [nbytes({n: state[n] for n in made.sent_names(state, number)}, wire) for number in (1, 2)]
    return " / ".join(
        f"{size:,}" for size in dict.fromkeys(up)
    ), f"{nbytes(state, wire):,}{' + residual' if strategy.folds else ''}"
