"""Membership inference by loss on the final model: the loss itself, and its ratio to models that did not see a record.

The second is RMIA (Zarifzadeh, Liu and Shokri, arXiv 2312.03262), offline: Pr(x) is the mean of exp(−loss) over
reference models that were not trained on x (their a = 1), of which the base before training is one that costs nothing.
Their score, the share of other records z with LR(x, z) ≥ γ, grows with Pr(x|θ)/Pr(x); so it orders records as that
ratio does, which is used here.

What it proves. fedlab holds out records by an even draw within each client. So of a pair, one that was trained on and
one that was held out, matched at random, a fair coin said which is which, independently of other pairs: to swap the two
would have been as likely. The bound of Steinke et al. (arXiv 2305.08846) counts how many coins are guessed right. To
swap a pair replaces a record, which is removing one and adding one: under (ε, δ) for add or remove (or zeroing out) it
is (2ε, (1 + e^ε)·δ), and so half of what the bound gives is a lower bound on ε. It needs the references not to know the
coins: of each pair they train on one by a coin of their own. It is no bound where held-out records were chosen
otherwise: after ``data.duplicates = "purge"``, which takes out those whose text was trained on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlab.data import FederatedData
from fedlab.data.opening import secrets_of
from fedlab.errors import Diverged
from fedlab.evaluate.memorisation.losses import record_losses
from fedlab.evaluate.memorisation.rates import auc, auc_interval, clopper_pearson, false_alarms, hits_at
from fedlab.evaluate.memorisation.references import train_reference
from fedlab.lora.state import State
from fedlab.seeds import random_stream
from fedlab.session import Session
from fedlab.trainer_audit.bounds import FRACTIONS, one_run_guesses, steinke_epsilon

logger = logging.getLogger("fedlab")
CONFIDENCE = 0.95
NO_CLAIM = 1e-5  # δ at which a bound is given where nothing is promised
LEAST = 2  # pairs


@dataclass(frozen=True)
class Claim:
    """What a run promises: the largest ε over its clients and their largest δ, for one ``unit``."""

    epsilon: float
    delta: float
    unit: str = "example"


@dataclass(frozen=True)
class Pairs:
    """Records that were trained on and records that were held out, [m] corpus positions each; i and i are a pair of
    one client.
    """

    members: np.ndarray
    others: np.ndarray

    def __len__(self) -> int:
        return len(self.members)


def pairs_of(data: FederatedData, most: int, seed: int, end: int | None = None) -> Pairs:
    """Of each client as many random pairs as there are, at most ``most``; ``end``: inserted records begin there."""
    members, others = [np.array([], dtype=np.int64)], [np.array([], dtype=np.int64)]
    for client in data.clients:
        rng = random_stream(seed, "membership", client)
        trained = data.train(client)
        trained = trained if end is None else trained[trained < end]
        count = min(len(trained), len(data.local_test(client)), most)
        members.append(rng.permutation(trained)[:count])
        others.append(rng.permutation(data.local_test(client))[:count])
    return Pairs(np.concatenate(members), np.concatenate(others))


def measure_membership(
    session: Session, start: State, state: State, trained: Callable[[int], Sequence[str]], claim: Claim | None
) -> dict[str, Any]:
    """``membership`` of ``result.json``. Arguments as of ``fedlab.evaluate.memorisation.memorisation``."""
    config, data = session.config, session.data
    settings, secrets = config.evaluate.membership, secrets_of(config)
    assert settings is not None
    pairs = pairs_of(data, settings.pairs, config.run.seed, None if secrets is None else secrets.first)
    if len(pairs) < LEAST:
        return {"pairs": len(pairs), "references": 0, "attacks": {}, "epsilon": None, "confidence": CONFIDENCE}
    both = np.concatenate([pairs.members, pairs.others])  # [2m]
    final = _losses(session, state, both)
    outside = [(np.ones(len(both), dtype=bool), _losses(session, start, both))]
    for number in range(settings.references):
        rng = random_stream(config.run.seed, "membership", "reference", number)
        first = rng.random(len(pairs)) < 0.5
        inside = np.concatenate([first, ~first])
        rest = np.setdiff1d(np.concatenate([data.train(client) for client in data.clients]), pairs.members)
        try:
            model = train_reference(session, start, np.sort(np.concatenate([rest, both[inside]])), trained, number)
        except Diverged as error:  # what is measured after a run must not fail it
            logger.warning("membership: a reference model is left out: %s", error)
            continue
        outside.append((~inside, _losses(session, model, both)))
    ratio = log_ratio(final, np.array([known for _, known in outside]), np.array([out for out, _ in outside]))
    sound = config.data.duplicates != "purge"
    return {
        "pairs": len(pairs),
        "references": len(outside),
        "attacks": {
            "loss": _figures(-final, config.run.seed),
            "ratio": _figures(ratio, config.run.seed),
        },
        "epsilon": epsilon_bound(ratio, pairs, claim) if sound else None,
        "confidence": CONFIDENCE,
    }


def log_ratio(final: np.ndarray, known: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """log Pr(x|θ) − log Pr(x) of each record, [N]; high if the model finds it likelier than models do that did not see
    it.

    Args:
        final: its loss under the final model [N].
        known: its losses under the reference models [K, N].
        outside: whether each did not see it [K, N]; of every record one at least.
    """
    likelihoods = np.where(outside, -known, -np.inf)
    highest = likelihoods.max(0)
    total = np.log(np.exp(likelihoods - highest).sum(0)) + highest - np.log(outside.sum(0))
    return np.asarray(-final - total)


def epsilon_bound(scores: np.ndarray, pairs: Pairs, claim: Claim | None) -> float:
    """A lower bound on ε at ``CONFIDENCE``, from the scores [2m] of members and then of others.

    Under the claim, or at δ = ``NO_CLAIM`` where there is none.
    """
    count = len(pairs)
    earlier = pairs.members < pairs.others  # an order of the two that does not know which is which
    difference = np.where(earlier, 1.0, -1.0) * (scores[:count] - scores[count:])
    delta = NO_CLAIM if claim is None else (1 + math.exp(min(claim.epsilon, 700.0))) * claim.delta
    if delta >= 1:
        return 0.0
    level = 1 - (1 - CONFIDENCE) / len(FRACTIONS)
    tried = [one_run_guesses(difference, earlier, max(1, int(fraction * count))) for fraction in FRACTIONS]
    return max(steinke_epsilon(count, guesses, right, delta, level) for guesses, right in tried) / 2


def _losses(session: Session, state: State, positions: np.ndarray) -> np.ndarray:
    session.model.load(state)
    data = session.data
    return record_losses(
        session.model,
        data.tokens.lengths(positions),
        lambda chunk, pad: data.batch(positions[chunk], pad),
        session.config.evaluate.batch_size,
    )


def _figures(scores: np.ndarray, seed: int) -> dict[str, Any]:
    """What scores [2m] of members and then of others tell them apart by."""
    count = len(scores) // 2
    members, others = scores[:count], scores[count:]
    rate = false_alarms(count)
    hits = None if rate is None else hits_at(members, others, rate)
    return {
        "auc": auc(members, others),
        "auc_interval": auc_interval(members, others, CONFIDENCE, seed),
        "fpr": rate,
        "tpr": None if hits is None else hits / count,
        "tpr_interval": None if hits is None else clopper_pearson(hits, count, CONFIDENCE),
    }
