"""What ``result.json`` says was measured of the final model: its form, what follows from its own numbers, and whether
it contradicts the ε beside it. The measurements themselves cannot be made again from a run directory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedlab.privacy.audit.claims import RESULT, amount
from fedlab.privacy.audit.lines import Finding

FIGURES = {"membership": ("evaluate", "membership"), "exposure": ("data", "canaries")}  # → the section that asks for it
CLOSE = 1e-9


def check_memorisation(result: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings of a finished run; ``config``: the tables of ``run.toml``."""
    found = result.get("memorisation", {})
    if not isinstance(found, dict) or (odd := sorted(found.keys() - FIGURES.keys())):
        what = f"has {odd[0]!a}" if isinstance(found, dict) else "is no object"
        yield Finding(RESULT, None, f"memorisation {what}; it holds membership and exposure")
        return
    for name, (section, key) in FIGURES.items():
        table = config.get(section)
        asked = isinstance(table, dict) and table.get(key) is not None
        if asked != (name in found) and result.get("rounds"):
            yield Finding(RESULT, None, f"memorisation.{name} is {'missing' if asked else 'there'}, but run.toml asks"
                          f" for {'it' if asked else 'none'} ({section}.{key})")  # fmt: skip
    for name, figures in found.items():
        try:
            problem = _problem(name, figures)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            problem = "is not of the form that a run writes"
        if problem:
            yield Finding(RESULT, None, f"memorisation.{name} {problem}")
        else:
            yield from _against_claim(result, name, figures)


def _problem(name: str, figures: Mapping[str, Any]) -> str | None:
    if not 0 < figures["confidence"] < 1:
        return "has a confidence outside (0, 1)"
    if figures["epsilon"] is not None and amount(figures["epsilon"]) is None:
        return "has an ε that is none"
    return _membership(figures) if name == "membership" else _exposure(figures)


def _membership(figures: Mapping[str, Any]) -> str | None:
    for attack in figures["attacks"].values():
        for rate in ("auc", "tpr"):
            if (value := attack[rate]) is None:
                continue
            low, high = attack[f"{rate}_interval"]
            if not 0 <= low <= high <= 1 or not 0 <= value <= 1:
                return f"has a {rate} or an interval of it outside [0, 1]"
    return None


def _exposure(figures: Mapping[str, Any]) -> str | None:
    space, canaries = figures["space"], figures["canaries"]
    ranks = sorted(canary["rank"] for canary in canaries)
    if any(not isinstance(rank, int) or not 1 <= rank <= space for rank in ranks):
        return f"has a rank outside 1 to {space}"
    middle = ranks[(len(ranks) - 1) // 2]
    told = [*((c["exposure"], c["rank"]) for c in canaries), (figures["median"], middle), (figures["most"], 1)]
    if any(abs(bits - math.log2(space / rank)) > CLOSE * max(1.0, bits) for bits, rank in told):
        return "has an exposure that is not log2 of the space over the rank"
    most = math.log((1 - figures["confidence"]) / 2 * space / middle)
    if figures["epsilon"] > max(0.0, most) + CLOSE:
        return f"shows ε >= {figures['epsilon']:.4g}, more than its ranks can ({max(0.0, most):.4g})"
    return None


def _against_claim(result: Mapping[str, Any], name: str, figures: Mapping[str, Any]) -> Iterator[Finding]:
    claimed, shown = amount(result.get("epsilon")), figures["epsilon"]
    if claimed is not None and shown is not None and shown > claimed:
        yield Finding(
            RESULT,
            None,
            f"memorisation.{name} shows ε >= {shown:.4g} at {figures['confidence']:.0%} confidence, but {claimed:.4g}"
            " is claimed: the mechanism did not do what was accounted for",
        )
