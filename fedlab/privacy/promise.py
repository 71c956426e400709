"""What a run promises about privacy, in words: every sentence of it that anybody reads is made here.

The headline and the closing line on the terminal, ``report.html``, ``PRIVACY.md`` and the ``accountant`` of
``result.json`` all come from this file, which knows what is protected (``privacy.unit``), who adds the noise and who is
trusted with what, how sampling enters the account, and where the noise comes from. What no noise protects has its
sentences in ``fedlab.privacy.release``. ε is rounded up wherever it is shown, never down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from fedlab.config import RunConfig
from fedlab.privacy.accounting import DISCRETE
from fedlab.privacy.client_level import client_sampler
from fedlab.privacy.release import sentences

NO_DP = "no DP"  # wherever ε would stand
SEEDED = (
    "The noise was seeded so that the simulation can be repeated. Whoever knows the seed can subtract it: this run is"
    ' an experiment, not a protection. For real data set `privacy.noise = "secure"`.'
)
NOTHING = (
    'This run was made without differential privacy (`privacy.unit = "none"`). Its adapter and every message of its'
    " clients may reveal what they were trained on. Nothing is promised."
)
UNCOUNTED = (
    "The run ended before it knew its clients, and counted nothing. What was spent, if anything was, is in their"
    " ledgers."
)
DATA = (
    "`data.json` of this directory, which its owner alone can read: what was read, left out and found twice of the raw"
    " data, and the SHA-256 of their files"
)
PARTITION = (
    "`partition.json` of this directory, which its owner alone can read: how many records of each label every client"
    " has, and which ones"
)
BFLOAT16 = (
    "what rounding adds: the base was computed in bfloat16, where one record's length can move the others' clipped"
    " gradients (1.0004 C was seen where C is accounted for); ε is that of exact arithmetic"
)
ATTACKS = {"loss": "by loss", "ratio": "by its ratio to models that did not see the record (RMIA)"}
MEASURED = (
    "Low figures prove nothing: another attack or another record may show more, and what ε allows may still happen."
    " They were measured by whoever holds all data of this simulation, on records that were trained on; publishing them"
    " is not covered by ε."
)
# keyed by whom is trusted (``trust_model``): nobody, with all noise a client's own or shared; or the server
LEVEL = {
    "example": "example-level DP-SGD",
    "shared": "example-level DP-SGD, noise shared by clients",
    "client": "client-level DP, noise by a trusted server",
}
UNIT = {"example": "one record of one client", "client": "one client with all its records"}
NEIGHBOURS = {
    "example": (
        "neighbours differ by zeroing out one record, that is replacing it by nothing, since the number of records is"
        " public; or by adding or removing one, where that number is not looked at"
    ),
    "client": (
        "neighbours differ by zeroing out one client, that is replacing its update by nothing, since the number of"
        " clients is public; or by adding or removing one, where that number is not looked at"
    ),
}
TRUST = {
    "example": (
        "The adversary sees every client's every update: the server, the other clients and the public are not trusted."
    ),
    "shared": (
        "The adversary sees every sum of a round's clients and no single client's part: the server, {colluding}, and"
        " the public are not trusted. The noise of a sum is that of at"
        " least {honest} honest clients, and it is there whoever drops out: a round draws {drawn} clients, and with"
        " fewer than {survivors} in its sum nothing is released. Each of them adds 1/{honest} of the noise's variance:"
        " who colludes in greater number, or sees one client's part without a mask, is not covered by ε."
    ),
    "client": "The server is trusted: it sees each client's update as it is, and adds the noise.",
}
COLLUDING = (
    "as long as no client tells it what it knows",
    "one client who tells it all that it knows",
    "up to {} clients who tell it all that they know",
)
MASKED = "The parts were masked, so that the server learnt their sum alone."
UNMASKED = (
    "This simulation left the masks out (`privacy.masked = false`), since they cancel in the sum to the bit: whoever"
    " ran it could have seen each client's part, as it could have seen all data."
)
# (unit, sampler of the DP events) → in the accountant's line, and as a sentence of the statement
SAMPLING = {
    ("example", "poisson"): (
        "Poisson sampling within a client",
        "Poisson: each is drawn independently; ε counts on that, and the column without amplification does not",
    ),
    ("example", "poisson_discrete"): (
        "Poisson sampling within a client, discrete noise shared by clients",
        "Poisson: each is drawn independently, at one rate for all clients; ε counts on that, and the column without"
        " amplification does not",
    ),
    ("client", "poisson"): (
        "Poisson sampling of clients",
        "Poisson: each is drawn independently; ε counts on that, and on nobody but the server knowing who was drawn;"
        " the column without amplification does not",
    ),
    ("client", "full"): ("every client in every round", "all of them in every step: no amplification"),
    ("client", "fixed_wor"): (
        "fixed-size rounds, not amplified",
        "a fixed number in every step: no amplification, and twice the sensitivity",
    ),
}


def rounded_up(value: float, digits: int = 4) -> str:
    """Decimal form with so many digits that is never below the value."""
    if math.isinf(value):
        return str(value)
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def shown_epsilon(value: float | str | None, digits: int = 3) -> str:
    """An ε of ``result.json`` or ``metrics.jsonl`` for people: rounded up, "no DP", or "–" where there is none."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else rounded_up(value, digits)


def sampler_of(config: RunConfig) -> str:
    """The sampler of a private run's DP events: of records within a client, or of clients by the server."""
    if config.privacy.unit == "client":
        return client_sampler(config)
    return DISCRETE if config.shared_noise else "poisson"


def trust_model(config: RunConfig) -> str:
    """Who is trusted with what in a private run: a key of ``LEVEL`` and ``TRUST``."""
    return "shared" if config.shared_noise else config.privacy.unit


def trust(config: RunConfig) -> str:
    """Against whom a private run promises what it does, with how many colluding, and after how many dropouts."""
    said = TRUST[trust_model(config)]
    if not config.shared_noise:
        return said
    privacy = config.privacy
    assert privacy.survivors is not None
    drawn = config.clients_per_round if config.population_known else "at least as many"
    said = said.format(
        colluding=COLLUDING[min(privacy.colluding, 2)].format(privacy.colluding),
        survivors=privacy.survivors,
        honest=privacy.survivors - privacy.colluding,
        drawn=drawn,
    )
    return f"{said} {MASKED if privacy.masked else UNMASKED}"


def accountant(config: RunConfig, discrete: bool = False) -> str:
    """What computed ε, for which neighbours and which sampling: ``accountant`` of ``result.json``.

    ``discrete``: a ledger has releases with discrete noise, of this run or of an earlier one.
    """
    if not config.private:
        return NO_DP
    unit = config.privacy.unit
    by = "RDP at integer orders" if config.shared_noise or discrete else "PLD"
    return f"dp-accounting {by}, zero-out or add/remove one {unit}, {SAMPLING[unit, sampler_of(config)][0]}"


def headline(config: RunConfig) -> str:
    """What is asked for, for the line that a run begins with."""
    privacy = config.privacy
    if not config.private:
        return NO_DP
    asked = f"ε = {privacy.epsilon:g} per client" if privacy.epsilon is not None else f"σ = {privacy.sigma:g}"
    seeded = " (seeded noise: reproducible, so not for real data)" if privacy.noise == "seeded" else ""
    return f"{asked}, {LEVEL[trust_model(config)]}{_split(config)}{seeded}"


def _split(config: RunConfig) -> str:
    """How the noise is shared, in a headline."""
    privacy = config.privacy
    if not config.shared_noise:
        return ""
    colluding = f", {privacy.colluding} of them colluding" if privacy.colluding else ""
    return f" (sums of {privacy.survivors} or more{colluding}; {'masked' if privacy.masked else 'masks left out'})"


def closing(config: RunConfig, epsilon: float | str) -> str:
    """What was spent, for the lines that a run ends with."""
    if not config.private:
        return NO_DP
    whom = "maximum over clients" if config.privacy.unit == "example" else UNIT["client"]
    return f"ε = {shown_epsilon(epsilon)} ({whom})"


def promise(config: RunConfig, epsilon: float | str, delta: float | None) -> str:
    """The promise of a private run in one paragraph.

    Args:
        config: the run's configuration.
        epsilon: largest ε over the clients.
        delta: their δ; None if clients have different ones.
    """
    unit, shown = config.privacy.unit, shown_epsilon(epsilon, 4)
    at = f"δ = {delta:.3g}" if delta is not None else "each client's δ below"
    if unit == "client":
        return (
            f"The models that this run sent out, its final adapter included, are ({shown}, δ)-differentially private at"
            f" {at} for **{UNIT[unit]}**: whether any one client took part changes what anybody sees of them by no more"
            f" than that ({NEIGHBOURS[unit]}). {trust(config)}"
        )
    what = "sum of updates that the server received" if config.shared_noise else "update that a client sent"
    return (
        f"Every {what}, and everything computed from them, is (ε, δ)-differentially private for"
        f" **{UNIT[unit]}**: the largest ε over the clients is **{shown}** at {at} ({NEIGHBOURS[unit]})."
        f" {trust(config)} A person with records at several clients, or with k at one, is protected less: the ε of"
        " several clients add up, and k records at one client can cost more than k times its ε."
    )


def report(config: RunConfig, epsilon: float | str, delta: float | None) -> list[str]:
    """The paragraphs on privacy of ``report.html``, without markup; arguments as for ``promise``."""
    if not config.private:
        return [f"{NO_DP}: no privacy guarantee. {plain(NOTHING)}"]
    parts = [plain(promise(config, epsilon, delta)), f"Accountant: {accountant(config)}."]
    if config.privacy.noise == "seeded":
        parts.append(plain(SEEDED))
    return [*parts, f"Not protected: {plain('; '.join([*sentences(config), *limits(config)]))}."]


def memorised(figures: Mapping[str, Any] | None) -> list[str]:
    """What was measured of the final model, as paragraphs; ``figures``: ``memorisation`` of ``result.json``."""
    parts = [
        *_membership((figures or {}).get("membership")),
        *_exposure((figures or {}).get("exposure")),
    ]
    return [*parts, MEASURED] if parts else []


def _membership(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    if not found["attacks"]:
        return ["**Membership inference**: too few records were held out to try it."]
    told = []
    for name, attack in found["attacks"].items():
        text = f"{ATTACKS[name]}: AUC {attack['auc']:.3f} ({_interval(attack['auc_interval'])})"
        if attack["tpr"] is not None:
            text += f", TPR {attack['tpr']:.3f} ({_interval(attack['tpr_interval'])}) at FPR {attack['fpr']:g}"
        told.append(text)
    references = "the base alone" if found["references"] == 1 else f"{found['references']} models, the base one of them"
    return [
        f"**Membership inference** on the final model, {found['pairs']} pairs of a record that was trained on and one"
        f" that was held out, at {found['confidence']:.0%} confidence: {'; '.join(told)} (references: {references})."
        f" {_shown(found['epsilon'], found['confidence'])}"
    ]


def _exposure(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    bits = [canary["exposure"] for canary in found["canaries"]]
    records = found["canaries"][0]["records"]
    return [
        f"**Exposure** of {len(bits)} made-up secrets, each in {records} record(s) of one client, among"
        f" {found['space']} that there could have been: median {found['median']:.2f} bits, highest {max(bits):.2f}, of"
        f" {found['most']:.2f} at most (a guess: 1 or so). {_shown(found['epsilon'], found['confidence'])}"
    ]


def _interval(limits: Sequence[float]) -> str:
    return f"{limits[0]:.3f} to {limits[1]:.3f}"


def _shown(epsilon: float | None, confidence: float) -> str:
    """What a measurement says of ε; a lower bound is rounded down."""
    if epsilon is None:
        return 'It gives no bound on ε: with `data.duplicates = "purge"` held-out records were not chosen evenly.'
    shown = Decimal(repr(epsilon)).quantize(Decimal("0.001"), rounding=ROUND_FLOOR)
    return f"It shows ε ≥ {shown} at {confidence:.0%} confidence."


def limits(config: RunConfig) -> list[str]:
    """What nothing protects although no client sends it."""
    found = [PARTITION, DATA]
    if config.run.dtype == "bfloat16":
        found.append(BFLOAT16)
    return found


def plain(text: str) -> str:
    """A sentence without the statement's markup."""
    return text.replace("**", "").replace("`", "")
