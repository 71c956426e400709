"""The release at a task's end: what inputs the task used, as a sum of clipped Gram matrices over clients.

Under example-level DP each client's matrices are charged and noised before they leave it. Otherwise they leave it
masked, so that the server sees nothing but the sum over all clients (``fedlab.privacy.secure_sum.masking``), unless
``strategy.gram.clear`` says that it may.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from torch import Tensor

from clients.account import ClientAccount
from clients.basis import bases_directory
from clients.train import EXPECTED, received_state
from fedlab.config.tasks import Gram
from fedlab.continual.input_grams import input_grams, input_groups
from fedlab.continual.sketch import privatise, to_fixed
from fedlab.errors import PrivacyError
from fedlab.lora.state import digest
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.guard import Guard, plan_terms, public_reason, scope_of
from fedlab.privacy.noise import SecureNoise, SeededNoise
from fedlab.privacy.secure_sum.masking import add, masked, new_key, public_of
from fedlab.seeds import random_stream
from fedlab.session import Session

logger = logging.getLogger("fedlab")
# a run that is cut off here asks again when it is resumed; with secure noise that is a release, and a charge, of its
# own
ATTEMPTS = 3


def gram_message(session: Session, cohort: list[str], content: RecordDict, context: Context) -> RecordDict:
    """Reply to a gram message: the sum over the cohort in fixed point, which clients are in it, ledger lines and
    failures.
    """
    started = time.time()
    order = content.config_records["round"]
    settings = session.config.gram
    if settings is None:
        raise PrivacyError("this configuration has no release at a task's end")
    received = received_state(content, cast(str, order["wire_dtype"]))
    session.model.load(received | session.basis)
    groups, sent = input_groups(session.model), digest(received)
    total: dict[str, np.ndarray] = {}
    done: list[str] = []
    lines: dict[str, str] = {}
    failures: dict[str, str] = {}
    for client, known in zip(cohort, cast(list[int], order["known"]), strict=True):
        account = None
        try:
            account = ClientAccount(session, client, order, context) if session.config.private else None
            own = _release(session, client, groups, settings, account, order, sent)
            if not session.config.private and not settings.clear:
                own = _masked(own, client, settings, order, context)
            total = add(total, own)
            done.append(client)
        except EXPECTED as error:
            logger.warning("%s gave no Gram matrices: %s", client, error)
            failures[client] = public_reason(error) if account else f"{type(error).__name__}: {error}"
        if account:
            lines[client] = account.lines_after(known)
    return RecordDict(
        {
            "grams": ArrayRecord({name: Array(value) for name, value in total.items()}),
            "clients": ConfigRecord({"ids": done}),
            "charges": ConfigRecord({"ids": list(lines), "lines": list(lines.values())}),
            "failures": ConfigRecord({"ids": list(failures), "reasons": list(failures.values())}),
            "metrics": MetricRecord({"started": started, "ended": time.time()}),
        }
    )


def keys_message(cohort: list[str], content: RecordDict, context: Context) -> RecordDict:
    """Reply to a keys message: a fresh public key of every client,
    whose private part waits on this node for the sum.
    """
    order = content.config_records["round"]
    keys = {}
    for client in cohort:
        private, path = new_key(), _key_file(client, order, context)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
        keys[client] = public_of(private)
    return RecordDict({"keys": ConfigRecord({"ids": list(keys), "public": list(keys.values())})})


def _masked(
    values: dict[str, np.ndarray], client: str, settings: Gram, order: ConfigRecord, context: Context
) -> dict[str, np.ndarray]:
    """The values under this client's masks; its key is used once and gone.

    Two sums over different clients differ by what those have who are in one of them alone. So a client is in sums over
    one set of clients: the first, which it writes down before it sends anything. Raises PrivacyError for another.
    """
    path = _key_file(client, order, context)
    try:
        private = path.read_bytes()
    except OSError:
        raise PrivacyError(f"{client} has no key for this sum: none was asked for, or it was used already") from None
    path.unlink()
    peers = dict(zip(cast(list[str], order["peers"]), cast(list[str], order["public"]), strict=True))
    first, now = path.with_suffix(".peers"), "\n".join(sorted(peers))
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
    ):
        file.write(now)
        file.flush()
        os.fsync(file.fileno())
    if first.read_text() != now:
        raise PrivacyError(
            f"{client} was asked for a sum over other clients before: the difference of both would show single ones"
        )
    return masked(
        values, private, client, peers, f"{cast(str, order['run'])}|{cast(int, order['attempt'])}", settings.min_clients
    )


def _key_file(client: str, order: ConfigRecord, context: Context) -> Path:
    return bases_directory(order, context) / "keys" / f"{client}-{cast(str, order['run'])}.key"


def _release(
    session: Session,
    client: str,
    groups: dict[str, str],
    settings: Gram,
    account: ClientAccount | None,
    order: ConfigRecord,
    sent: str,
) -> dict[str, np.ndarray]:
    """One client's matrices in fixed point; under DP charged before its data is read, and noised."""
    positions = session.data.train(client)
    size = session.config.train.physical_batch

    def look() -> dict[str, Tensor]:
        return input_grams(session.model, session.data, positions, groups, settings.clip, size)

    if account is None:
        return to_fixed(look())
    width = {name: session.shapes[f"{name}.lora_A"][1] for name in sorted(set(groups.values()))}
    terms = gram_terms(account, settings, {name: (n, n) for name, n in width.items()})
    guard = Guard(account.guard.ledger, release_run(account.guard.run))
    if refusal := guard.plan(terms, {}):
        raise refusal
    seeded = SeededNoise(random_stream(session.config.sampling_seed, "noise", client, "gram"))
    noise = seeded if account.plan.noise == "seeded" else SecureNoise()
    with guard.charge(terms, 1, sent) as commit:
        released = to_fixed(privatise(look(), settings.sigma, settings.clip, noise))
        commit(1, fixed_digest(released))
    return released


def release_run(run: str) -> str:
    """The release's name in a ledger: a run of its own, of one round, named after the run that it belongs to."""
    return hashlib.sha256(f"{run}|gram".encode()).hexdigest()[:32]


def gram_terms(account: ClientAccount, settings: Gram, shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What the client signs for the release: one Gaussian mechanism over all its texts."""
    plan = account.plan
    own = plan_terms(
        Event("full", 1.0, settings.sigma, 1),
        unit="example",
        clip=settings.clip,
        normaliser=1.0,
        delta=plan.delta,
        n=plan.n,
        participations=ATTEMPTS,
        noise=plan.noise,
    )
    return {**account.terms, **own, "scope": scope_of(shapes)}


def fixed_digest(values: dict[str, np.ndarray]) -> str:
    """SHA-256 of what was released."""
    import torch

    return digest({name: torch.from_numpy(value) for name, value in values.items()})
