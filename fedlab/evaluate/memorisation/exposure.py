"""Exposure of made-up secrets: log2 |R| − log2 rank (Carlini et al., arXiv 1802.08232, eq. 3).

The space R is the list that the secrets were chosen from (``fedlab.data.canaries``), so the rank is exact, and exposure
at most log2 |R|. A secret is ranked among the sequences that are no secret and itself; as likely ones count against it.

What it proves. A secret is one of R by an even draw. Without the record it would be among the k most likely of N with
probability k/N; with r records of it under (ε, δ), with e^{rε}·k/N + δ_r at most, where δ_r = δ·(e^{rε} − 1)/(e^ε − 1).
If half of the m secrets have a rank up to k, Markov's inequality gives twice that, however they depend on each other.
So at confidence 1 − α, ε ≥ ln((α/2 − δ_r)·N/k)/r with k the median rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedlab.data.canaries import Secrets
from fedlab.data.collate import tokenise
from fedlab.evaluate.memorisation.losses import record_losses
from fedlab.evaluate.memorisation.membership import CONFIDENCE, NO_CLAIM, Claim
from fedlab.session import Session


def measure_exposure(session: Session, secrets: Secrets, claim: Claim | None) -> dict[str, Any]:
    """``exposure`` of ``result.json``, of the model as it is loaded."""
    model, config = session.model, session.config
    tokens = tokenise(secrets.records, model.tokenizer, config.data.max_length, model.objective)
    lengths = tokens.lengths(np.arange(len(secrets.records)))
    losses = record_losses(model, lengths, tokens.batch, config.evaluate.batch_size)
    ranks = ranks_of(losses, secrets.chosen)
    space = len(losses) - len(ranks) + 1
    return {
        "space": space,
        "most": math.log2(space),
        "canaries": [
            {"client": client, "records": secrets.copies, "rank": int(rank), "exposure": exposure(int(rank), space)}
            for client, rank in zip(secrets.clients, ranks, strict=True)
        ],
        "median": exposure(middle(ranks), space),
        "epsilon": epsilon_bound(middle(ranks), space, secrets.copies, claim),
        "confidence": CONFIDENCE,
    }


def ranks_of(losses: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of each secret, 1 + how many sequences that are no secret are at least as likely, [m].

    Args:
        losses: of the whole space [N].
        chosen: positions of the secrets [m].
    """
    rest = np.sort(np.delete(losses, chosen))
    return np.asarray(1 + np.searchsorted(rest, losses[chosen], side="right"))


def exposure(rank: int, space: int) -> float:
    """log2 |R| − log2 rank, bits; 0 to log2 |R|."""
    return math.log2(space) - math.log2(rank)


def middle(ranks: np.ndarray) -> int:
    """The rank that half of the secrets, or more, do not exceed."""
    return int(np.sort(ranks)[(len(ranks) - 1) // 2])


def epsilon_bound(rank: int, space: int, copies: int, claim: Claim | None) -> float:
    """A lower bound on ε at ``CONFIDENCE``: half of the secrets, or more, have a rank up to ``rank``.

    Under the claim, or at δ = ``NO_CLAIM`` where there is none.
    """
    delta = NO_CLAIM if claim is None else claim.delta
    if claim is not None and claim.unit == "client":
        copies = 1  # whatever a client holds, it is protected at once
    if claim is not None:
        delta *= sum(math.exp(min(i * claim.epsilon, 700.0)) for i in range(copies))
    room = (1 - CONFIDENCE) / 2 - delta
    return 0.0 if room <= 0 else max(0.0, math.log(room * space / rank) / copies)
