"""``PRIVACY.md``: what a run promises and to whom, in plain sentences, made from the ledgers in the run directory and
nothing else.

Wording follows "How to DP-fy ML" (arXiv 2303.00654, section 5.3): unit, neighbours, adversary, what is released, ε with
δ, accountant, sampler, what is not covered. ``fedlab audit`` compares the table with its own computation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlab.config import RunConfig
from fedlab.files import write
from fedlab.privacy.accounting import DISCRETE, Event, optimistic
from fedlab.privacy.ledger.ledger import SERVER, Entry, charged, event_of, events, parse_lines
from fedlab.privacy.ledger.spending import exact, merged
from fedlab.privacy.promise import NOTHING, SAMPLING, SEEDED, limits, memorised, promise, rounded_up
from fedlab.privacy.release import sentences

EMPIRICAL = "empirical.json"  # written by ``fedlab audit --empirical`` into a run directory


def write_statement(
    path: Path, clients: Mapping[str, Mapping[str, Any]], memorisation: Mapping[str, Any] | None = None
) -> Path:
    """Write ``PRIVACY.md`` of the run in ``path``; ``clients`` and ``memorisation`` as ``result.json`` has them.

    Raises PrivacyError for unreadable ledgers.
    """
    target = path / "PRIVACY.md"
    write(target, statement(path, clients, memorisation))
    return target


def statement(
    path: Path, clients: Mapping[str, Mapping[str, Any]], memorisation: Mapping[str, Any] | None = None
) -> str:
    """The text of ``PRIVACY.md``: the same bytes for the same files; ``fedlab audit`` makes it again and compares."""
    config = RunConfig.load(path / "run.toml")
    run = json.loads((path / "environment.json").read_text(encoding="utf-8"))["run_id"]
    if not config.private:
        text = f"# {config.run.name}: no privacy guarantee\n\n{NOTHING}\n"
        return "\n".join(part for part in (text, _memorised(memorisation)) if part)
    ledgers = {
        file.stem: parse_lines(file.read_text(encoding="utf-8")) for file in sorted((path / "ledger").glob("*.jsonl"))
    }
    own = ledgers[SERVER] if config.privacy.unit == "client" and SERVER in ledgers else None
    rows = [
        _row(client, own if own is not None else ledgers.get(client, []), run, entry)
        for client, entry in clients.items()
    ]
    largest, deltas = max((row["epsilon"] for row in rows), default=0.0), {row["delta"] for row in rows if row["plan"]}
    promised = promise(config, largest, deltas.pop() if len(deltas) == 1 else None)
    parts = [f"# {config.run.name}: what this run promises\n", f"{promised}\n"]
    if config.privacy.noise == "seeded":
        parts.append(f"**{SEEDED}**\n")
    parts += [
        _table(rows),
        _mechanism(rows, config.privacy.unit),
        _scores(config),
        _empirical(path),
        _memorised(memorisation),
        _uncovered(config),
        _history(rows),
        _heads(ledgers),
    ]
    return "\n".join(part for part in parts if part)


def _row(client: str, entries: Sequence[Entry], run: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the ledger of a client shows; ``known``: what ``result.json`` says of it."""
    plans = [e for e in entries if e["type"] == "PLAN"]
    plan = next((p for p in plans if p["run"] == run), plans[-1] if plans else None)
    delta = float.fromhex(plan["delta"]) if plan else float(known.get("delta") or 0.0)  # it refused to sign
    unseen = known.get("unseen", ())
    spent = merged([*events(entries), *map(event_of, unseen)])
    return {
        "client": client,
        "plan": plan,
        "delta": delta,
        "spent": spent,
        "epsilon": exact(spent, delta) if plan else 0.0,
        "unamplified": exact(map(_unsampled, spent), delta) if plan else 0.0,
        "optimistic": optimistic(spent, delta) if plan and any(e.sampler == DISCRETE for e in spent) else None,
        "before": exact([event_of(e["event"]) for e in charged(entries) if e["run"] != run], delta) if plan else 0.0,
        "rounds": len(charged(entries, run)),
        "earlier": len({e["run"] for e in charged(entries)} - {run}),
        "unseen": len(unseen),
        "refusals": [e for e in entries if e["type"] == "REFUSE" and e["run"] == run],
    }


def _unsampled(event: Event) -> Event:
    """The same steps as if each had seen every record."""
    return Event(DISCRETE if event.sampler == DISCRETE else "full", 1.0, event.sigma, event.steps)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| client | ε | δ | rounds charged | ε before this run | ε without amplification | budget |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        budget = row["plan"]["budget"] if row["plan"] else None
        limit = f"{float.fromhex(budget['epsilon']):g}" if budget else "–"
        cells = (
            row["client"],
            rounded_up(row["epsilon"]),
            f"{row['delta']:.6g}",
            row["rounds"],
            rounded_up(row["before"]),
        )
        lines.append("| " + " | ".join(map(str, (*cells, rounded_up(row["unamplified"]), limit))) + " |")
    lines += [
        "",
        "ε is that of all charges in the client's ledger, rounded up; a charge counts in full whether or not an update came of it.",
        "",
    ]
    for row in rows:
        if row["unseen"]:
            lines.append(
                f"- {row['client']}: {row['unseen']} charge(s) are counted that its ledger does not show: it was asked, and did not prove what it did."
            )
        for entry in row["refusals"]:
            lines.append(
                f"- {row['client']} refused {'to begin' if not entry['round'] else 'round ' + str(entry['round'])}: {entry['kind']}: {entry['reason']}"
            )
    return "\n".join(lines) + "\n"


def _mechanism(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    plan = next((row["plan"] for row in rows if row["plan"]), None)
    if plan is None:
        return ""
    event, code, shared = event_of(plan["event"]), plan["code"], plan.get("shared")
    who = "the server, over clients" if unit == "client" else "each client, over its records"
    sampler = SAMPLING.get((unit, event.sampler), ("", f"{event.sampler}: no amplification"))[1]
    sigmas = sorted({round(event_of(row["plan"]["event"]).sigma, 4) for row in rows if row["plan"]})
    kind = "exact integers" if shared else "float64"
    discrete = any(row["optimistic"] is not None for row in rows)  # in this run, or an earlier one of these ledgers
    by = "dp-accounting RDP at integer orders," if discrete else code.get("accountant", "dp-accounting PLD")
    noise = (
        f"AES-256-CTR keyed by the operating system, {kind}"
        if plan["noise"] == "secure"
        else f"seeded generator, {kind}: reproducible"
    )
    return (
        f"**Mechanism.** Clipped sums with Gaussian noise, by {who}: one joint norm C = {float.fromhex(plan['clip']):g} over all trained tensors, noise "
        f"multiplier σ = {sigmas[0]:g}{f' to {sigmas[-1]:g}' if len(sigmas) > 1 else ''}, {event.steps} step(s) per round. **Sampling**: {sampler}. "
        f"**Noise source**: {noise}. **Accountant**: {by}"
        f"{' ' + code['dp-accounting'] if 'dp-accounting' in code else ''} (upper bound). "
        f"Averaging and re-factorising noised updates is post-processing and costs nothing.\n{_shares(rows, shared)}"
    )


def _shares(rows: Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None) -> str:
    """How the noise of a sum is split among its clients, and what ε would be if it were continuous."""
    if shared is None:
        return ""
    honest, grid = shared["survivors"] - shared["colluding"], 2.0 ** -shared["bits"]
    share = float.fromhex(shared["share"]) * grid
    best = max((row["optimistic"] for row in rows if row["optimistic"] is not None), default=0.0)
    return (
        f"\n**Shares.** Each client rounds its sum to a grid of C/2^{shared['bits']} and adds a discrete Gaussian of standard deviation {share:.6g}·C, sampled exactly; those of "
        f"{honest} honest clients of at least {shared['survivors']} come to σ·(C + √{shared['dimension']}·C/2^{shared['bits']}), the rounding included. ε is by RDP at integer orders, where "
        f"discrete noise has the moments of continuous noise; by PLD, were it continuous, it would be {rounded_up(best)}, which is no guarantee.\n"
    )


def _scores(config: RunConfig) -> str:
    """The charged release of clients' scores, if the run makes it."""
    if (sigma := config.privacy.scores_sigma) is None:
        return ""
    return (
        "**Scores.** After the last round each client sent once which share of its held-out records the model gets right, with Gaussian noise of "
        f"σ = {sigma:g} on their number; that is charged in its ledger and part of its ε.\n"
    )


def _empirical(path: Path) -> str:
    file = path / EMPIRICAL
    if not file.is_file():
        return (
            "**Empirical audit**: none was made of this configuration (`fedlab audit --empirical RUN_DIR/run.toml`).\n"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    bounds = "; ".join(
        f"{b['name']}: ε ≥ {b['epsilon']:.2f} ({b['confidence']:.0%}, m = {b['canaries']})" for b in found["bounds"]
    )
    verdict = (
        "It found no contradiction"
        if not found["findings"]
        else f"**It contradicts the claim: {found['findings'][0]}**"
    )
    setting = found["configuration"]
    return (
        f"**Empirical audit** of the trainer with gradient canaries (white box, q = {setting['q']:g}, σ = {setting['sigma']:g}, {setting['steps']} step(s); claimed "
        f"for that setting: ε = {rounded_up(found['claimed'], 3)} at δ = {found['delta']:g}): {bounds}. {verdict}. A lower bound is evidence against bugs, not an estimate "
        "of ε.\n"
    )


def _memorised(figures: Mapping[str, Any] | None) -> str:
    """What was measured of the final model; nothing where nothing was."""
    return "".join(f"{text}\n\n" for text in memorised(figures)).removesuffix("\n") if figures else ""


def _uncovered(config: RunConfig) -> str:
    """What no noise protects: the public releases of the run, and what is known without any message."""
    items = [
        *sentences(config),
        *limits(config),
        "the set of labels, how the text was preprocessed, and what the base model had seen before",
        "scores measured on held-out records, which were never trained on",
        "the choice of settings: earlier runs on the same data count only if they are in the same ledgers",
    ]
    if config.lora.public is not None:
        public = config.lora.public
        items.append(
            f"the texts of `{public}` (`lora.public`): what is trained depends on what the model makes of them"
        )
    return "**Not protected**:\n" + "\n".join(f"- {item};" for item in items).rstrip(";") + ".\n"


def _history(rows: Sequence[Mapping[str, Any]]) -> str:
    earlier = max((row["earlier"] for row in rows), default=0)
    if not earlier:
        return "**Earlier runs on the same data**: none in these ledgers.\n"
    return f"**Earlier runs on the same data**: up to {earlier} in these ledgers; what they spent is included above.\n"


def _heads(ledgers: Mapping[str, Sequence[Entry]]) -> str:
    lines = [
        f"- {owner}: line {entries[-1]['seq'] + 1}, `{entries[-1]['hash']}`"
        for owner, entries in ledgers.items()
        if entries
    ]
    return "**Ledgers** (check with `fedlab audit RUN_DIR`):\n" + "\n".join(lines) + "\n"
