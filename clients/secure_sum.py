"""A client's part in secure sums, kept on its disk, so that any process may serve it and a crash repeats nothing.

Of a run's sums a client keeps, below ``keys`` in its store: its cipher key; what it prepared, under the sum's full
name; and, under purpose and number alone, what it masked, confirmed and revealed. Each of these files is made
once and whole before anything is sent: the same request gets the same answer, another is refused. They are deleted two
rounds later.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from clients.node import Node
from clients.owner import Owner
from clients.pending import failure_of
from fedlab.config import RunConfig
from fedlab.errors import SumRefused
from fedlab.files import below, create
from fedlab.privacy.secure_sum.keys import new_private, public_of, signed_cipher_key
from fedlab.privacy.secure_sum.masking import values_digest
from fedlab.privacy.secure_sum.participant import Prepared, confirmed, masked, prepare, revealed
from fedlab.privacy.secure_sum.settings import Purpose, bounds, subject_of
from fedlab.protocol.sum_messages import (
    Confirmation,
    ConfirmReply,
    ConfirmRequest,
    Preparation,
    PrepareReply,
    PrepareRequest,
    Revealed,
    SumKey,
    SumOrder,
    SumPlan,
    SumSetting,
    UnmaskOrder,
    UnmaskReply,
    UnmaskRequest,
)

CIPHER, PREPARED, MASKED, CONFIRMED, REVEALED = "cipher", "prepared", "masked", "confirmed", "revealed"
_PREPARED = TypeAdapter(Prepared)


def sum_key(owner: Owner, run: str) -> SumKey:
    """A client's key of this run's sums, signed by its identity: made at first, and the same ever after."""
    return signed_cipher_key(owner.identity, run, owner.client, public_of(_cipher(owner, run)))


def answer_prepare(node: Node, request: PrepareRequest) -> PrepareReply:
    """Every client's fresh key and sealed shares, or why there are none."""
    run = request.run.run
    return PrepareReply(tuple(_prepare(node, client, run, request.sum) for client in request.clients))


def hide(
    owner: Owner, values: Mapping[str, np.ndarray], run: str, subject: tuple[Purpose, int], order: SumOrder
) -> dict[str, np.ndarray]:
    """The values (int64, modulo 2⁶⁴) under this client's masks of the sum ``order``, which is about ``subject``.

    Raises SumRefused where nothing was prepared for it, an order that no honest server gives, or if something else was
    masked for the same purpose and number before: two values under one mask, or two sums of different clients, show
    their difference.
    """
    if subject_of(order.name) != subject:
        raise SumRefused(f"a sum for {subject[0]} {subject[1]} was asked for under the name {order.name}")
    prepared = _prepared(owner, run, order.name)
    hidden = masked(prepared, order, values)
    said = {"name": order.name, "values": values_digest(values)}
    if _once(_path(owner, run, order.name, MASKED), said) != said:
        raise SumRefused(f"{owner.client} masked other values, or for another sum, in {order.name} before")
    return hidden


def answer_confirm(node: Node, request: ConfirmRequest) -> ConfirmReply:
    """Every client's signature of who dropped out, given once, or why there is none."""
    return ConfirmReply(tuple(_confirm(node, client, request) for client in request.clients))


def answer_unmask(node: Node, request: UnmaskRequest) -> UnmaskReply:
    """Every client's shares, given once, and its preparation of the next sum if it is in it."""
    shares = tuple(_reveal(node, order, request) for order in request.clients)
    following = request.following
    if following is None:
        return UnmaskReply(shares)
    asked = [order.client for order in request.clients if order.client in following.setting.participants]
    return UnmaskReply(shares, tuple(_prepare(node, client, request.run.run, following) for client in asked))


def forget(owner: Owner, run: str) -> None:
    """Delete a client's keys of a run that is over."""
    shutil.rmtree(_folder(owner, run), ignore_errors=True)


def _prepare(node: Node, client: str, run: str, plan: SumPlan) -> Preparation:
    owner = node.owners.one(client)
    try:
        _check_setting(node.config, owner, plan.setting)
        path = below(_folder(owner, run), f"{plan.setting.name}.{PREPARED}")
        if not path.exists():
            fresh = prepare(owner.identity, _cipher(owner, run), run, client, plan)
            create(path, _PREPARED.dump_json(fresh))
        kept = _prepared(owner, run, plan.setting.name)
        other = [peer for peer, key in kept.keys.items() if peer not in plan.keys or plan.keys[peer].public != key]
        if kept.setting != plan.setting or other:
            raise SumRefused(f"{client} prepared another sum under the name {plan.setting.name}")
        return kept.reply
    except Exception as error:
        owner.note(error, f"no preparation of {plan.setting.name}")
        return Preparation(client, failure=failure_of(error))


def _confirm(node: Node, client: str, request: ConfirmRequest) -> Confirmation:
    owner, run = node.owners.one(client), request.run.run
    try:
        prepared = _masked(owner, run, request.name)
        signature = confirmed(owner.identity, prepared, request.dropped)
        said = {"name": request.name, "dropped": sorted(set(request.dropped))}
        if _once(_path(owner, run, request.name, CONFIRMED), said) != said:
            raise SumRefused(f"{client} confirmed others in {request.name} before")
        return Confirmation(client, signature)
    except Exception as error:
        owner.note(error, f"no confirmation in {request.name}")
        return Confirmation(client, failure=failure_of(error))


def _reveal(node: Node, order: UnmaskOrder, request: UnmaskRequest) -> Revealed:
    owner, run, name = node.owners.one(order.client), request.run.run, request.name
    try:
        prepared = _masked(owner, run, name)
        dropped = sorted(set(request.dropped))
        signed = _read(_path(owner, run, name, CONFIRMED))
        if signed is not None and signed != {"name": name, "dropped": dropped}:
            raise SumRefused(f"{owner.client} confirmed others in {name} before")
        shares = revealed(_cipher(owner, run), prepared, dropped, request.confirmed, order.sealed)
        asked = hashlib.sha256(json.dumps([name, dropped, sorted(order.sealed.items())]).encode()).hexdigest()
        said = {"asked": asked, "shares": shares}
        if _once(_path(owner, run, name, REVEALED), said) != said:
            raise SumRefused(f"{owner.client} revealed shares for another request in {name} before")
        _forget_before(owner, run, name)
        return Revealed(owner.client, shares)
    except Exception as error:
        owner.note(error, f"no shares in {name}")
        return Revealed(order.client, failure=failure_of(error))


def _check_setting(config: RunConfig, owner: Owner, setting: SumSetting) -> None:
    """Raise SumRefused unless the configuration asks for this sum, and its owner knows all who are in it."""
    purpose, number = subject_of(setting.name)
    if not (number == 0 if purpose == "gram" else 1 <= number <= config.run.rounds):
        raise SumRefused(f"this configuration has no sum {setting.name}")
    found, wanted = (setting.survivors, setting.colluding), bounds(config, purpose, len(setting.participants))
    if found != wanted:
        raise SumRefused(f"survivors and colluding of {setting.name} are {found}, the configuration says {wanted}")
    roster = owner.roster
    for peer, identity in setting.participants.items():
        if roster is not None and peer != owner.client and roster.get(peer) != identity:
            known = "has another key in" if peer in roster else "is not in"
            raise SumRefused(f"{peer} {known} this client's [roster]; ask its owner for its identity, and enter it")


def _masked(owner: Owner, run: str, name: str) -> Prepared:
    """What was prepared for a sum in which this client masked something. Raises SumRefused if it did not."""
    said = _read(_path(owner, run, name, MASKED))
    if said is None or said["name"] != name:
        raise SumRefused(f"{owner.client} masked nothing for {name}")
    return _prepared(owner, run, name)


def _prepared(owner: Owner, run: str, name: str) -> Prepared:
    path = below(_folder(owner, run), f"{name}.{PREPARED}")
    try:
        return _PREPARED.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise SumRefused(f"{owner.client} prepared nothing for {name}, or that is no longer there") from None


def _cipher(owner: Owner, run: str) -> bytes:
    """The private cipher key of a run."""
    path = below(_folder(owner, run), CIPHER)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        create(path, new_private())
    return path.read_bytes()


def _folder(owner: Owner, run: str) -> Path:
    """Where a client's keys of this run's sums lie."""
    return below(owner.places.store, "keys", f"{owner.client}-{run}")


def _path(owner: Owner, run: str, name: str, what: str) -> Path:
    """The file of what is done once for a purpose and number, whatever the attempt."""
    purpose, number = subject_of(name)
    return below(_folder(owner, run), f"{purpose}-{number}.{what}")


def _once(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Write down what is about to be said, unless something is written there; what is."""
    create(path, json.dumps(said))
    return _read(path) or {}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return found


def _forget_before(owner: Owner, run: str, name: str) -> None:
    """Delete what belongs to sums of this purpose two numbers ago and more: nobody can ask for it any more.

    Secrets go first: one that outlived, in a crash, what was said of it could be asked for twice.
    """
    purpose, number = subject_of(name)
    for path in sorted(_folder(owner, run).iterdir(), key=lambda path: path.suffix != f".{PREPARED}"):
        parts = path.name.split(".")[0].split("-")
        if parts[0] == purpose and len(parts) > 1 and int(parts[1]) < number - 1:
            path.unlink(missing_ok=True)
