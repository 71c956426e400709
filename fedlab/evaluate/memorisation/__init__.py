"""What the final model knows by heart, measured where all data are at hand: in a simulation.

Two figures, of single records. *Membership*: can a record that was trained on be told from one that was held out, by
its loss? *Exposure*: how far up a made-up secret is among all secrets that there could have been. Both are evidence
against a broken mechanism, never for one: a low figure says that this attack on these records found little.

Nothing here is charged. Who holds the data measures them; what it prints is about records that were trained on, and
no ε covers its publication (``fedlab.privacy.promise``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from fedlab.data.opening import secrets_of
from fedlab.evaluate.memorisation.exposure import measure_exposure
from fedlab.evaluate.memorisation.membership import Claim, measure_membership
from fedlab.lora.state import State
from fedlab.session import Session, torch_threads

__all__ = ["Claim", "asked", "memorisation"]


def asked(session: Session) -> bool:
    """Whether anything is to be measured."""
    return session.config.evaluate.membership is not None or session.config.data.canaries is not None


def memorisation(
    session: Session, start: State, state: State, trained: Callable[[int], Sequence[str]], claim: Claim | None
) -> dict[str, Any]:
    """``memorisation`` of ``result.json``: ``membership`` and ``exposure``, each if it was asked for.

    Args:
        session: model and data of a simulation.
        start: what the first round began from.
        state: the final one.
        trained: round → names of the tensors that clients trained in it, for reference models.
        claim: what the run promises for one record; None if it promises nothing.
    """
    found: dict[str, Any] = {}
    with torch_threads(os.cpu_count() or 1):
        if session.config.evaluate.membership is not None:
            found["membership"] = measure_membership(session, start, state, trained, claim)
        if (secrets := secrets_of(session.config)) is not None:
            session.model.load(state)
            found["exposure"] = measure_exposure(session, secrets, claim)
    return found
