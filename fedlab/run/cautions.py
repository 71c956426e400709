"""What a result alone does not say: that training diverged, that a score is no better than a guess, who was left out.

Every sentence of it that anybody reads, on the terminal, in ``result.json`` (``warnings``) and in ``report.html``, is
made here, from what the run has written down. A warning fails nothing: the run did what its configuration says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlab.config import RunConfig

ABSURD = 2.0  # times the loss of guessing evenly: no model that learns is so wrong
GROWN = 1.5  # times the least loss of the run
DROWNED = 1.0  # times what all gradients together can amount to
SHOWN = 3  # clients that are named one by one


def cautions(
    config: RunConfig,
    result: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    held_out: Mapping[str, int] | None = None,
    choices: int | None = None,
) -> list[str]:
    """Sentences to print beside how a run ended.

    Args:
        config: of the run.
        result: what ``result.json`` says.
        lines: of ``metrics.jsonl``.
        held_out: label → texts that the score was measured on; None where labels have no names.
        choices: labels that a text is told apart among; default: those of ``held_out``.
    """
    choices = choices or len(held_out or ())
    return [
        *_loss(result, lines, choices),
        *_chance(result, held_out or {}, choices),
        *_left_out(result, lines),
        *_noise(config, result),
        *_delta(result),
        *_refuted(config, result),
    ]


def _loss(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], choices: int) -> list[str]:
    """Of the held-out texts, and where clients share it of training."""
    course = [
        (line["round"], _number(line["scores"]["loss"]))
        for line in lines
        if line["phase"] == "evaluate" and "loss" in line["scores"] and line.get("examples", 1)
    ]
    training = [(line["round"], _number(line.get("loss"))) for line in lines if line["phase"] == "train"]
    for what, values in (("held-out", course), ("training", training)):
        if not values:
            continue
        known = [(value, number) for number, value in values if value is not None and not math.isnan(value)]
        last = values[-1][1]
        if last is None and what == "training":  # under DP nobody says
            continue
        if last is None or math.isinf(last):
            return [f"the {what} loss is not a number: training diverged; lower train.lr"]
        guess, (least, when) = math.log(choices) if choices > 1 else None, min(known)
        if guess is not None and last > ABSURD * guess:
            return [
                f"the {what} loss is {last:,.4g}, where guessing evenly among {choices} labels costs {guess:.3g}:"
                " training diverged; lower train.lr"
            ]
        if last > GROWN * least and last > (guess or 0.0) and when != values[-1][0]:
            return [
                f"the {what} loss grew from {least:.4g} (round {when}) to {last:.4g}: training diverges, or learns the"
                " training texts by heart; lower train.lr, or take fewer rounds"
            ]
    return []


def _chance(result: Mapping[str, Any], held_out: Mapping[str, int], choices: int) -> list[str]:
    """An accuracy that needs no model."""
    scores = result.get("scores") or {}
    score = scores.get("accuracy")
    if score is None and result.get("primary") == "accuracy":
        score = (result.get("client_scores") or {}).get("mean")
    if score is None or not held_out or choices < 2:
        return []
    label, texts = max(held_out.items(), key=lambda item: item[1])
    majority, even = texts / sum(held_out.values()), 1 / choices
    if score > majority and score > even:
        return []
    found = [
        f"answering {label!r} every time ({majority:.4f})" if score <= majority else "",
        f"guessing evenly among {choices} labels ({even:.4f})" if score <= even else "",
    ]
    return [
        f"accuracy {score:.4f} is no better than {' or '.join(filter(None, found))}: the model has learnt nothing that"
        " shows; more rounds, another train.lr, or less noise"
    ]


def _left_out(result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Clients whose update was not used in some round, and clients that took no part."""
    rounds: dict[str, int] = {}
    reasons: dict[str, str] = {}
    trained = [line for line in lines if line["phase"] == "train"]
    for line in trained:
        for client, reason in line["excluded"].items():
            rounds[client] = rounds.get(client, 0) + 1
            reasons[client] = reason
    refused = {
        client: entry["refused"] for client, entry in (result.get("clients") or {}).items() if "refused" in entry
    }
    found = [
        f"{client} was excluded in {count} of {len(trained)} rounds: {reasons[client]}"
        for client, count in rounds.items()
        if client not in refused
    ]
    found += [f"{client} takes no further part: {reason}" for client, reason in refused.items()]
    more = len(found) - SHOWN
    return found if more <= 1 else [*found[:SHOWN], f"{more} more clients were left out; see metrics.jsonl"]


def _noise(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    ratio = _number(result.get("noise_ratio"))
    if ratio is None or ratio < DROWNED:
        return []
    return [
        f"the noise drowns what is learnt: over all rounds its norm is {ratio:,.3g} times the most that the clipped"
        " gradients can add up to; raise privacy.epsilon (or lower privacy.sigma), or take larger batches, more clients"
        " or more rounds, or a smaller lora.rank"
    ]


def _delta(result: Mapping[str, Any]) -> list[str]:
    products = {
        client: entry["delta"] * entry["examples"]
        for client, entry in (result.get("clients") or {}).items()
        if entry.get("delta")
    }
    if not products or max(products.values()) <= 0.1:
        return []
    client = max(products, key=lambda name: products[name])
    return [
        f"privacy.delta is large for {client}: δ·n = {products[client]:.2g} is above 0.1, and δ is the probability with"
        " which a record may be published outright"
    ]


def _refuted(config: RunConfig, result: Mapping[str, Any]) -> list[str]:
    """An ε that the final model itself contradicts."""
    claimed = _number(result.get("epsilon")) if config.private else None
    found = []
    for what, figures in (result.get("memorisation") or {}).items():
        shown = figures.get("epsilon")
        if claimed is not None and shown is not None and shown > claimed:
            found.append(
                f"{what}: the final model shows ε ≥ {shown:.3g} at {figures['confidence']:.0%} confidence, but"
                f" {claimed:.3g} is claimed: the noise or the clip is not what was accounted for; run fedlab audit"
                " --empirical on this configuration, and trust no ε of this build until it is explained"
            )
    return found


def noise_ratio(parts: Sequence[tuple[float, int]], coordinates: int) -> float | None:
    """Norm of all noise of a run over the most that its clipped gradients can add up to, in the mean of the clients.

    With C the clip, a step adds at most C to a client's change, if all gradients are as long as they may be and point
    one way, and noise of expected norm (σC/(q·n))·√d. Noise adds up by its squares. Above 1 a run may still learn,
    since the noise of most coordinates does not matter.

    Args:
        parts: of each client, σ/(q·n) (the noise of one step over the clip), and its steps in all rounds.
        coordinates: d, trained numbers.

    Returns:
        The ratio; None where nothing was done.
    """
    steps = sum(count for _, count in parts)
    return math.sqrt(coordinates * sum(std**2 * count for std, count in parts)) / steps if steps else None


def _number(value: Any) -> float | None:
    """A number of a JSON line, where infinities are strings and NaN is null."""
    return None if value is None else float(value)
